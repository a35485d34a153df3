"""What a healthy transaction costs on the wire, beside plain psycopg2."""

from zreconnect import Ledger
from zreconnect.tests.base import DatabaseTestCase


class RoundTripTests(DatabaseTestCase):
    # The last of them asks for the id.
    trips_of_writing = 3

    def transaction(self, connection, end):
        def use():
            cursor = connection.cursor()
            cursor.execute("SELECT 1")
            cursor.fetchall()
            cursor.close()
            end(connection)

        return use

    def test_one_statement(self):
        ours = self.connect()
        with self.plain() as plain:
            for end in (type(plain).commit, type(plain).rollback):
                name = end.__name__
                counts = []
                for connection in (ours, plain):
                    use = self.transaction(connection, lambda c, name=name: getattr(c, name)())
                    use()
                    counts.append(self.round_trips(use))
                self.assertEqual(counts, [2, 3])

    def test_a_server_side_cursor_costs_one_more(self):
        ours = self.connect()
        with self.plain() as plain:

            def use(connection):
                cursor = connection.cursor("numbers")
                cursor.execute("SELECT 1")
                cursor.fetchall()
                cursor.close()
                connection.commit()

            counts = []
            for connection in (ours, plain):
                use(connection)
                counts.append(self.round_trips(lambda connection=connection: use(connection)))
        self.assertEqual(counts[0] - counts[1], 1)

    def test_an_idle_connection_sends_nothing(self):
        connection = self.connect()
        connection.begin()
        connection.commit()
        before = self.forward.count()
        for _ in range(3):
            connection.rollback()
            connection.commit()
            connection.cursor().close()
        self.assertEqual(self.forward.count(), before)

    def test_either_witness_costs_none(self):
        for witness in ("xid", Ledger(), None):
            use = self.transaction(
                self.connect(witness=witness), lambda connection: connection.commit()
            )
            use()
            self.assertEqual(self.round_trips(use), 2)

    def test_a_statement_that_writes(self):
        self.make_table()
        for witness, expected in (("xid", self.trips_of_writing), (Ledger(), 2), (None, 2)):
            connection = self.connect(witness=witness)
            cursor = connection.cursor()

            def use(connection=connection, cursor=cursor):
                cursor.execute("DELETE FROM item")
                connection.commit()

            use()
            self.assertEqual(self.round_trips(use), expected, witness)

    def test_a_read_only_transaction_has_no_witness(self):
        for witness in ("xid", Ledger()):
            connection = self.connect(witness=witness)
            connection.readonly = True
            with connection.transaction() as cursor:
                cursor.execute("SELECT pg_current_xact_id_if_assigned()")
                self.assertEqual(cursor.fetchone(), (None,))

    def test_reconnecting_sends_begin_once_more(self):
        connection = self.connect(witness=None)
        use = self.transaction(connection, lambda connection: connection.commit())

        def first():
            self.connect(witness=None).begin()

        connecting = self.round_trips(first) - 1
        use()
        self.forward.drop()
        self.assertEqual(self.round_trips(use), connecting + 3)
