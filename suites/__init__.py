"""Other projects' own test suites, run with their driver as it is (bare) and through zreconnect.

``make suites`` runs them all, ``make suites SUITES="storm django"`` these. Each module of this
package that has `SUITES` describes one project's; ``through`` has what puts zreconnect into the
driver's place there. What is fetched and made is in ``.suites``.
"""
