"""One connection for each thread, and none for anybody else."""

import gc
import os
import threading
import warnings

import psycopg2
import transaction

from zreconnect import ConnectionDescriptor, DisconnectionError
from zreconnect.tests.base import DatabaseTestCase, wait_until


class DescriptorTests(DatabaseTestCase):
    def setUp(self):
        super().setUp()
        self.make_table()
        descriptor = ConnectionDescriptor(self.dsn)

        class Item:
            connection = descriptor

        self.Item = Item
        self.descriptor = descriptor
        self.addCleanup(descriptor.close)
        self.addCleanup(transaction.abort)

    def insert(self, name):
        self.Item.connection.cursor().execute("INSERT INTO item VALUES (%s)", (name,))

    def test_class_and_instances_have_the_threads_connection(self):
        self.assertIs(self.Item.connection, self.Item.connection)
        self.assertIs(self.Item().connection, self.Item.connection)

    def test_it_takes_part_in_the_threads_transaction(self):
        self.insert("one")
        transaction.commit()
        self.insert("two")
        transaction.abort()
        self.assertEqual(self.names(), ["one"])

    def test_threads_never_share(self):
        self.insert("one")
        mine = self.Item.connection
        seen = []

        def other():
            seen.append(self.Item.connection is mine)
            self.insert("two")
            transaction.commit()
            try:
                mine.cursor()
            except psycopg2.ProgrammingError as error:
                seen.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        self.assertFalse(seen[0])
        self.assertIn("belongs to another thread", seen[1])
        transaction.abort()
        self.assertEqual(self.names(), ["two"])

    def test_a_thread_that_ends_leaves_no_connection_behind(self):
        gc.disable()
        self.addCleanup(gc.enable)
        for leave in (transaction.commit, transaction.abort, lambda: None):

            def work(leave=leave):
                self.insert(f"in thread {leave}")
                leave()

            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            wait_until(lambda: not self.sessions())

    def test_close(self):
        self.insert("one")
        self.descriptor.close()
        wait_until(lambda: not self.sessions())
        with self.assertRaisesRegex(psycopg2.InterfaceError, "descriptor is closed"):
            _ = self.Item.connection

    def test_bad_arguments(self):
        with self.assertRaises(ValueError):
            ConnectionDescriptor("oracle://here/db")
        with self.assertRaisesRegex(TypeError, "policy"):
            ConnectionDescriptor(self.dsn, policy=5)


class ProcessTests(DatabaseTestCase):
    """After os.fork() the child uses nothing of the parent's."""

    def setUp(self):
        super().setUp()
        self.make_table()

    def in_child(self, function):
        """Run ``function`` in a forked child; it must return true there."""
        with warnings.catch_warnings():
            # Python 3.12 warns of forking with threads, and the forwarder is one.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = 0 if function() else 2
            finally:
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        self.assertEqual(os.waitstatus_to_exitcode(status), 0)

    def test_an_idle_connection_gets_a_session_of_its_own(self):
        connection = self.connect()
        connection.begin()
        mine = connection.get_backend_pid()
        connection.rollback()
        socket = connection.fileno()

        def child():
            # What was the parent's socket is the null device now.
            is_null = os.fstat(socket).st_rdev == os.stat(os.devnull).st_rdev
            with connection.transaction() as cursor:
                cursor.execute("INSERT INTO item VALUES ('child')")
                theirs = connection.get_backend_pid()
            connection.close()
            return is_null and theirs != mine

        self.in_child(child)
        with self.events() as seen, connection.transaction() as cursor:
            cursor.execute("INSERT INTO item VALUES ('parent')")
        self.assertEqual(seen, [])
        self.assertEqual(connection.get_backend_pid(), mine)
        self.assertEqual(self.names(), ["child", "parent"])

    def test_a_transaction_stays_the_parents(self):
        connection = self.connect()
        cursor = connection.cursor()
        cursor.execute("INSERT INTO item VALUES ('parent')")

        def child():
            try:
                cursor.execute("INSERT INTO item VALUES ('child')")
            except DisconnectionError:
                connection.rollback()
                cursor.execute("SELECT count(*) FROM item")
                return cursor.fetchone() == (0,)

        self.in_child(child)
        connection.commit()
        self.assertEqual(self.names(), ["parent"])

    def test_a_child_that_ends_normally_or_collects_garbage_sends_nothing(self):
        connection = self.connect()
        connection.begin()
        connections = [connection]

        def child():
            connections[0].close()
            connections.clear()
            gc.collect()
            return True

        before = self.forward.count()
        self.in_child(child)
        self.assertEqual(self.forward.count(), before)
        connection.rollback()

    def test_connections_of_other_threads_are_left_alone(self):
        descriptor = ConnectionDescriptor(self.dsn)
        self.addCleanup(descriptor.close)
        begun, forked = threading.Event(), threading.Event()
        errors = []

        def other():
            try:
                descriptor.connection().cursor().execute("INSERT INTO item VALUES ('thread')")
                begun.set()
                forked.wait()
                transaction.commit()
            except Exception as error:
                errors.append(error)
                begun.set()

        thread = threading.Thread(target=other)
        thread.start()
        begun.wait()

        def child():
            gc.collect()
            descriptor.connection().cursor().execute("INSERT INTO item VALUES ('child')")
            transaction.commit()
            return True

        self.in_child(child)
        forked.set()
        thread.join()
        self.assertEqual(errors, [])
        self.assertEqual(self.names(), ["child", "thread"])

    def test_a_fork_while_another_thread_connects(self):
        self.forward.silence()
        connection = self.connect()
        thread = threading.Thread(target=connection.begin)
        before = self.forward.count()
        thread.start()
        wait_until(lambda: (self.forward.count() - before).connections == 1)
        direct = self.server.dsn(dbname=self.dbname)

        def child():
            other = self.connect(direct)
            other.begin()
            other.close()
            # Its attempt is the parent's; the child's own one comes to an end too.
            return True

        self.in_child(child)
        self.forward.resume()
        thread.join()
        self.assertEqual(connection.state, "active")
