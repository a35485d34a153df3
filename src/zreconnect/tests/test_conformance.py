"""Every driver here passes the conformance test that others have for theirs."""

import textwrap
import unittest

from zreconnect.testing import conformance

# The example in the documentation is psycopg2's test case.
_, _, rest = conformance.__doc__.partition("complete::\n")
EXAMPLE = textwrap.dedent(rest.partition("\nA driver in a distribution")[0])
exec(compile(EXAMPLE, conformance.__file__, "exec"))


class ExampleTests(unittest.TestCase):
    def test_the_example_is_a_test_case(self):
        example = globals()["Psycopg2Conformance"]
        self.assertTrue(issubclass(example, conformance.DriverConformance))
        self.assertGreater(len(unittest.defaultTestLoader.getTestCaseNames(example)), 50)
