"""zreconnect beside its peers: what they cost, and how they behave when the server goes away.

``make bench`` measures everything, ``make bench BENCH="transactions reading"`` these parts. Each
module of ``benchmarks.measurements`` that has `PART` is one. The results, the table and the plots
are in ``.benchmarks``; the peers are installed there, too, in an environment of their own.

``soak.py`` and ``web.py`` are programs of their own: whether anything is lost or done twice, and
how web servers fare.
"""
