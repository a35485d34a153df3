"""Django's ORM on a reconnecting connection: a management command through restarts."""

import contextlib
import io
import itertools
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from importlib import import_module
from pathlib import Path
from unittest import mock
from zoneinfo import ZoneInfo

import django.db
from django.apps import apps
from django.core.exceptions import ImproperlyConfigured
from django.core.management import call_command
from django.db import close_old_connections, connection, transaction
from django.db.models import Value
from django.db.models.functions import Coalesce
from django.db.utils import DatabaseError, ProgrammingError
from django.test.utils import CaptureQueriesContext
from psycopg import IsolationLevel

from zreconnect import (
    FAIL_FAST,
    CommitOutcomeUnknown,
    DisconnectionError,
    Ledger,
    ReconnectingConnection,
    ReconnectTimeout,
    RetryPolicy,
    retry_on_disconnect,
)
from zreconnect.integrations.django.base import DjangoDisconnectionError
from zreconnect.tests import django_project
from zreconnect.tests.base import DatabaseTestCase, wait_until
from zreconnect.tests.restarts import SurvivesRestarts

POLICY = RetryPolicy(timeout=30)
COMMAND = f"{django_project.__name__}.management.commands.import_files"


class DjangoTestCase(DatabaseTestCase):
    def setUp(self):
        super().setUp()
        self.use()
        self.addCleanup(django_project.forget_connections)
        call_command("migrate", run_syncdb=True, verbosity=0)
        # Models can be imported when the project is configured.
        self.File = apps.get_model("django_project", "File")
        self.record = import_module(COMMAND).record
        self.runs = []

    def use(self, time_zone=None, **options):
        database = {
            "ENGINE": "zreconnect.integrations.django",
            "HOST": self.forward.host,
            "PORT": self.forward.port,
            "NAME": self.dbname,
            "USER": self.server.user,
            "PASSWORD": self.server.password,
            "TIME_ZONE": time_zone,
            "OPTIONS": {"policy": POLICY, "witness": Ledger(), **options},
        }
        django_project.configure({"default": database})

    def paths(self):
        return [
            path for (path,) in self.query("SELECT path FROM django_project_file ORDER BY path")
        ]

    def work(self, meanwhile=lambda: None, nested=False, path="pack.py"):
        """Record a file; the first time, something happens meanwhile."""

        @retry_on_disconnect(timeout=30, min_interval=0)
        @transaction.atomic
        def unit():
            self.runs.append("run")
            self.File.objects.create(path=path)
            if len(self.runs) == 1:
                meanwhile()
            if nested:
                with transaction.atomic():
                    return self.File.objects.get(path=path)
            return self.File.objects.get(path=path)

        return unit()

    def lose(self):
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    def lose_commit(self):
        self.forward.cut("to_server", after=0)

    def lose_answer(self):
        self.forward.cut("to_client", after=0)


class UnitOfWorkTests(DjangoTestCase):
    def test_idle(self):
        self.work(path="a")
        self.server.restart()
        self.work(path="b")
        self.assertEqual(self.paths(), ["a", "b"])
        self.assertEqual(self.runs, ["run", "run"])

    def test_a_unit_of_work_is_run_again(self):
        for number, loss in enumerate((self.server.restart, self.lose, self.forward.drop), 1):
            self.runs.clear()
            self.work(loss, path=str(number))
            self.assertEqual(self.runs, ["run", "run"])
        self.assertEqual(self.paths(), ["1", "2", "3"])

    def test_the_loss_shows_in_a_nested_block(self):
        self.work(self.server.restart, nested=True)
        self.assertEqual(self.runs, ["run", "run"])
        self.assertEqual(self.paths(), ["pack.py"])

    def test_the_loss_happens_in_a_nested_block(self):
        def lose():
            with transaction.atomic(), transaction.atomic():
                self.File.objects.create(path="never")
                self.lose()

        self.work(lose)
        self.assertEqual(self.runs, ["run", "run"])
        self.assertEqual(self.paths(), ["pack.py"])

    def test_a_loss_that_is_swallowed_commits_nothing(self):
        with self.assertRaises(django.db.Error), transaction.atomic():
            self.File.objects.create(path="lost")
            try:
                with transaction.atomic():
                    self.lose()
            except DisconnectionError:
                pass
            self.File.objects.create(path="after")
        self.work()
        self.assertEqual(self.paths(), ["pack.py"])

    def test_a_loss_that_nothing_follows_is_told(self):
        """atomic() would roll back in silence, and return."""

        def optional():
            with contextlib.suppress(DatabaseError), transaction.atomic():
                self.lose()

        def handled():
            with contextlib.suppress(ZeroDivisionError), transaction.atomic():
                self.forward.drop()
                raise ZeroDivisionError

        def rolled_back():
            with transaction.atomic():
                self.File.objects.create(path="never")
                transaction.set_rollback(True)
                self.forward.drop()

        def saved():
            self.forward.drop()
            with contextlib.suppress(DatabaseError):
                self.File(path="never").save()

        for accident in (optional, handled, rolled_back, saved):
            with self.subTest(accident.__name__):
                with self.assertRaises(DjangoDisconnectionError), transaction.atomic():
                    self.File.objects.create(path="lost")
                    accident()
                # What runs it again knows whose loss it was.
                self.runs.clear()
                retry_on_disconnect(timeout=30, min_interval=0)(transaction.atomic(self.once))(
                    accident
                )
                self.assertEqual(self.paths(), [accident.__name__])
                self.query("DELETE FROM django_project_file")

    def once(self, accident):
        self.runs.append("run")
        self.File.objects.create(path=accident.__name__)
        if len(self.runs) == 1:
            accident()

    def test_a_rollback_that_the_program_wants_is_no_error(self):
        with transaction.atomic():
            self.File.objects.create(path="lost")
            self.forward.drop()
            transaction.set_rollback(True)
        self.assertEqual(self.paths(), [])
        self.work()
        self.assertEqual(self.paths(), ["pack.py"])

    def test_the_error_is_djangos_too(self):
        with self.assertRaises(django.db.OperationalError) as caught, transaction.atomic():
            self.lose()
        error = caught.exception
        self.assertIsInstance(error, DjangoDisconnectionError)
        self.assertIsInstance(error.getOriginalException()[1], connection.Database.Error)
        self.assertEqual(str(pickle.loads(pickle.dumps(error))), str(error))
        # The connection can be used again.
        self.work()
        self.assertEqual(self.paths(), ["pack.py"])

    def test_other_errors_are_djangos(self):
        self.work()
        with self.assertRaises(django.db.IntegrityError):
            self.work()
        self.assertEqual(self.runs, ["run", "run"])

    def test_hooks_are_called_once(self):
        called = []
        self.work(self.server.restart)

        @retry_on_disconnect(min_interval=0)
        @transaction.atomic
        def unit():
            self.runs.append("again")
            transaction.on_commit(lambda: called.append(len(self.runs)))
            self.File.objects.create(path="hook")
            if len(self.runs) == 3:
                self.lose()

        unit()
        self.assertEqual(called, [4])

    def test_a_connection_that_django_closes(self):
        self.work(path="a")
        self.server.restart()
        close_old_connections()
        self.work(path="b")
        with transaction.atomic():
            self.File.objects.create(path="never")
            connection.close()
        self.work(path="c")
        self.assertEqual(self.paths(), ["a", "b", "c"])

    def test_what_a_failed_transaction_leaves_is_of_no_use(self):
        def fail():
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1 / 0")

        def lose():
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")

        for spoil in (fail, lose):
            with self.subTest(spoil), contextlib.suppress(DatabaseError), transaction.atomic():
                self.assertTrue(connection.is_usable())
                try:
                    spoil()
                finally:
                    self.assertFalse(connection.is_usable())
            self.assertTrue(connection.is_usable())

    def close(self):
        connection.ensure_connection()
        connection.connection.close()

    def close_in_transaction(self):
        connection.set_autocommit(False)
        self.File.objects.count()
        connection.connection.driver_connection.close()

    def fail_by_hand(self):
        with connection.cursor() as cursor:
            cursor.execute("BEGIN")
            with contextlib.suppress(DatabaseError):
                cursor.execute("SELECT 1 / 0")

    def lose_without_autocommit(self):
        connection.settings_dict["AUTOCOMMIT"] = False
        connection.set_autocommit(False)
        with contextlib.suppress(DisconnectionError):
            self.lose()

    def test_what_is_of_no_use_is_found_between_requests(self):
        """Also if no error of Django's has told it."""

        def check():
            for spoil in (
                self.close,
                self.close_in_transaction,
                self.fail_by_hand,
                self.lose_without_autocommit,
            ):
                with self.subTest(spoil):
                    spoil()
                    self.assertFalse(connection.is_usable())
                    close_old_connections()
                    self.assertIsNone(connection.connection)
                    self.assertFalse(connection.is_usable())
                    connection.settings_dict["AUTOCOMMIT"] = True
                    self.work(path=spoil.__name__)
            django_project.forget_connections()

        check()
        paths = self.paths()
        self.assertEqual(len(paths), 4)
        self.query("TRUNCATE django_project_file CASCADE")
        thread = threading.Thread(target=check)
        thread.start()
        thread.join()
        self.assertEqual(self.paths(), paths)

    def test_a_connection_that_is_closed_by_hand_in_the_driver(self):
        self.work(path="a")
        connection.connection.driver_connection.close()
        self.assertTrue(connection.is_usable())
        self.work(path="b")
        self.assertEqual(self.paths(), ["a", "b"])

    def test_a_connection_that_is_too_old(self):
        self.use()
        connection.settings_dict["CONN_MAX_AGE"] = 0
        self.work(path="a")
        close_old_connections()
        self.assertIsNone(connection.connection)
        self.work(path="b")
        self.assertEqual(self.paths(), ["a", "b"])

    def test_a_health_check_costs_nothing(self):
        self.work(path="a")
        self.assertTrue(connection.is_usable())
        connection.health_check_enabled = True
        connection.health_check_done = False
        self.server.restart()
        self.work(path="b")
        self.assertEqual(self.paths(), ["a", "b"])


class TimeLimit(Exception):
    """As Celery's soft time limit is raised, by the handler of a signal."""


class TimeLimitTests(DjangoTestCase):
    def setUp(self):
        super().setUp()

        def handler(*args):
            raise TimeLimit

        self.addCleanup(signal.signal, signal.SIGUSR1, signal.signal(signal.SIGUSR1, handler))

    @contextlib.contextmanager
    def limited(self, query):
        """A signal comes, once, when the query gets a row."""
        main = threading.main_thread().ident

        def interrupt():
            wait_until(lambda: self.query(query))
            signal.pthread_kill(main, signal.SIGUSR1)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with self.assertRaises(TimeLimit):
            yield
        thread.join()

    def sleep(self):
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(60)")

    def test_in_a_statement(self):
        with self.limited("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"):
            self.work(self.sleep, path="never")
        self.assertEqual(self.runs, ["run"])
        self.assertTrue(connection.get_autocommit())
        close_old_connections()
        self.work(path="later")
        self.assertEqual(self.paths(), ["later"])

    def test_where_django_switches_the_mode(self):
        """The next block is committed: Django does not go on with the mode of the last one."""
        interrupted = mock.Mock(side_effect=TimeLimit)
        switch = {"autocommit": property(fset=interrupted)}
        for name, replaced in (("switch", switch), ("roll back", {"rollback": interrupted})):
            with self.subTest(name), contextlib.ExitStack() as stack:
                with self.assertRaises(TimeLimit), transaction.atomic():
                    self.File.objects.create(path=name)
                    stack.enter_context(mock.patch.multiple(ReconnectingConnection, **replaced))
                    if name == "roll back":
                        raise TimeLimit
                stack.close()
                self.work(path=f"after {name}")
        self.assertEqual(self.paths(), ["after roll back", "after switch", "switch"])

    def test_a_mode_that_cannot_be_switched(self):
        self.work()
        transaction.set_autocommit(False)
        self.work(path="manually")
        with self.assertRaises(DatabaseError):
            transaction.set_autocommit(True)
        transaction.commit()
        transaction.set_autocommit(True)
        self.assertEqual(self.paths(), ["manually", "pack.py"])

    def test_at_commit(self):
        """Nothing is lost or done twice, whatever becomes of the answer."""
        done = "SELECT 1 FROM django_project_file WHERE path = 'at commit'"
        with mock.patch("zreconnect.guard.PATIENCE_OF_ROLLBACK", 0.1), self.limited(done):
            self.work(path="before")
            with transaction.atomic():
                self.File.objects.create(path="at commit")
                self.forward.silence("to_client")
        self.forward.resume()
        with self.assertRaises(CommitOutcomeUnknown):
            transaction.rollback()
        close_old_connections()
        self.work(path="later")
        self.assertEqual(self.paths(), ["at commit", "before", "later"])

    def test_between_commit_and_the_end_of_the_block(self):
        """rollback() tells that it is committed, wherever the time limit comes."""
        wrapper = type(django.db.connections["default"])

        def and_then(self):
            commit(self)
            raise TimeLimit

        def hook():
            with transaction.atomic():
                self.File.objects.create(path="by a hook")
            with self.assertRaises(ValueError), transaction.atomic():
                raise ValueError
            raise TimeLimit

        commit = wrapper.commit
        cases = [
            ("after the commit", {"commit": and_then}, None),
            ("in the switch", {"_set_autocommit": mock.Mock(side_effect=TimeLimit)}, None),
            (
                "before the hooks",
                {"run_and_clear_commit_hooks": mock.Mock(side_effect=TimeLimit)},
                None,
            ),
            ("in a hook", {}, hook),
            ("in a hook that closes the connection", {}, lambda: (connection.close(), hook())),
        ]
        for name, replaced, called in cases:
            with self.subTest(name), contextlib.ExitStack() as stack:
                with self.assertRaises(TimeLimit), transaction.atomic():
                    self.File.objects.create(path=name)
                    if called is not None:
                        transaction.on_commit(called)
                    for attribute, value in replaced.items():
                        stack.enter_context(mock.patch.object(wrapper, attribute, value))
                stack.close()
                with self.assertRaises(CommitOutcomeUnknown) as caught:
                    transaction.rollback()
                self.assertEqual(caught.exception.outcome, "committed")
                transaction.rollback()
                self.assertIn(name, self.paths())
                self.File.objects.filter(path="by a hook").delete()

    def interrupted(self, number, path):
        """Whether the time limit comes at that line of Django's, and what is told then."""
        is_interrupted = is_committed = False

        def trace(frame, event, argument):
            nonlocal number
            if frame.f_code.co_filename != transaction.__file__:
                return None
            number -= event == "line"
            if number == 0:
                sys.settrace(None)
                raise TimeLimit
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            with transaction.atomic():
                self.File.objects.create(path=path)
        except TimeLimit:
            is_interrupted = True
            try:
                transaction.rollback()
            except CommitOutcomeUnknown as error:
                is_committed = error.outcome == "committed"
            except transaction.TransactionManagementError:
                self.assertTrue(connection.in_atomic_block)
        finally:
            sys.settrace(before)
        return is_interrupted, is_committed

    def test_between_two_tasks_a_worker_leaves_nothing_open(self):
        """Wherever in Django's own lines it has come, the task can be done again, and the next."""
        self.use(options="-c lock_timeout=5s")
        expected = set()
        for number in itertools.count(1):
            path, following = f"{number}", f"{number}, and the next"
            is_interrupted, is_committed = self.interrupted(number, path)
            if connection.in_atomic_block:
                connection.close()
                del django.db.connections["default"]
            close_old_connections()
            if is_interrupted and not is_committed:
                self.File.objects.create(path=path)
            with transaction.atomic():
                self.File.objects.create(path=following)
            expected |= {path, following}
            self.assertEqual(set(self.paths()), expected)
            if not is_interrupted:
                break
        self.assertGreater(number, 20)

    def test_who_goes_on_is_told_nothing_of_what_was_before(self):
        with self.assertRaises(TimeLimit), transaction.atomic():
            self.File.objects.create(path="pack.py")
            transaction.on_commit(mock.Mock(side_effect=TimeLimit))
        with self.assertRaises(ValueError), transaction.atomic():
            raise ValueError
        transaction.rollback()

    def test_who_commits_by_himself_is_told_at_once(self):
        self.addCleanup(transaction.set_autocommit, True)
        transaction.set_autocommit(False)
        with transaction.atomic():
            self.File.objects.create(path="manually")
            transaction.on_commit(mock.Mock(side_effect=TimeLimit))
        transaction.commit()
        with self.assertRaises(TimeLimit):
            transaction.set_autocommit(True)
        transaction.set_autocommit(False)
        self.File.objects.create(path="manually, too")
        transaction.commit()
        transaction.rollback()


class CommitTests(DjangoTestCase):
    def unit(self, lose, path):
        """A unit of work whose COMMIT is lost the first time, or the answer to it."""

        @retry_on_disconnect(timeout=30, min_interval=0)
        @transaction.atomic
        def unit():
            self.runs.append("run")
            self.File.objects.create(path=path)
            if len(self.runs) == 1:
                lose()

        unit()

    def test_the_answer_is_lost(self):
        self.unit(self.lose_answer, "pack.py")
        self.assertEqual(self.runs, ["run"])
        self.assertEqual(self.paths(), ["pack.py"])

    def test_commit_is_lost(self):
        self.unit(self.lose_commit, "pack.py")
        self.assertEqual(self.runs, ["run", "run"])
        self.assertEqual(self.paths(), ["pack.py"])

    def test_the_outcome_is_unknown(self):
        self.use(witness=None)
        for lose in (self.lose_answer, self.lose_commit):
            self.runs.clear()
            with self.assertRaises(CommitOutcomeUnknown):
                self.unit(lose, lose.__name__)
            self.assertEqual(self.runs, ["run"])
        # The connection can be used again.
        self.work(path="later")
        self.assertEqual(self.paths(), ["later", "lose_answer"])

    def test_hooks_of_an_unknown_outcome_are_not_called_after_the_next_commit(self):
        self.use(witness=None)
        called = []

        def lose():
            transaction.on_commit(lambda: called.append("unknown"))
            self.lose_answer()

        with self.assertRaises(CommitOutcomeUnknown):
            self.unit(lose, "a")
        self.work(path="b")
        self.assertEqual(self.paths(), ["a", "b"])
        self.assertEqual(called, [])


class WaitingTests(DjangoTestCase):
    def test_no_server_within_the_timeout(self):
        self.use(policy=RetryPolicy(timeout=0.2))
        for connected in (False, True):
            with self.subTest(connected=connected):
                self.server.shut_down()
                outer, inner = transaction.atomic(), transaction.atomic()
                with self.assertRaises(ReconnectTimeout), outer, inner:
                    self.File.objects.create(path="never")
                self.server.start()
                self.work(path=str(connected))
        self.assertEqual(self.paths(), ["False", "True"])

    def test_the_server_is_named_before_there_was_a_session(self):
        self.use(policy=RetryPolicy(timeout=0))
        address = f"postgresql://{self.server.user}@{self.forward.host}:{self.forward.port}/"
        self.server.shut_down()
        cases = [({}, address + self.dbname), ({"service": "shop"}, "the server of ")]
        for service, named in cases:
            connection.settings_dict["OPTIONS"].update(service)
            with self.assertRaisesRegex(ReconnectTimeout, named), self.service("shop"):
                connection.cursor()
            del django.db.connections["default"]

    @contextlib.contextmanager
    def service(self, name):
        with tempfile.NamedTemporaryFile("w") as file:
            print(f"[{name}]", file=file, flush=True)
            with mock.patch.dict(os.environ, PGSERVICEFILE=file.name):
                yield

    def test_fail_fast(self):
        self.use(policy=FAIL_FAST)
        self.server.shut_down()
        for _ in range(2):
            with self.assertRaises(django.db.OperationalError) as caught, transaction.atomic():
                self.File.objects.create(path="never")
            self.assertIsInstance(caught.exception, DisconnectionError)
        self.server.start()
        self.work()
        self.assertEqual(self.paths(), ["pack.py"])

    def test_all_connections_know_the_same_of_the_server(self):
        def server():
            connection.ensure_connection()
            return connection.connection.work.link.server

        def server_of_another_thread():
            servers.append(server())
            connection.close()

        first, servers = server(), []
        thread = threading.Thread(target=server_of_another_thread)
        thread.start()
        thread.join()
        connection.close()
        self.assertEqual([*servers, server()], [first, first])
        for name, value in {"USER": "nobody", "PASSWORD": "wrong"}.items():
            self.use()
            connection.settings_dict[name] = value
            with self.assertRaises(django.db.OperationalError):
                connection.ensure_connection()
            connection.close()
            connection.settings_dict[name] = getattr(self.server, name.lower())
            self.assertIs(server(), first)
        self.use(isolation_level=IsolationLevel.SERIALIZABLE)
        self.assertIsNot(server(), first)

    def test_a_silent_host_keeps_no_other_from_being_tried(self):
        self.use(policy=FAIL_FAST)
        seconds = mock.patch.object(type(FAIL_FAST), "longest_attempt", return_value=3.0)
        with socket.create_server(("127.0.0.1", 0)) as silent, seconds:
            connection.settings_dict["HOST"] = "127.0.0.1,127.0.0.1"
            connection.settings_dict["PORT"] = f"{silent.getsockname()[1]},{self.server.port}"
            self.work()
        self.assertEqual(self.paths(), ["pack.py"])

    def test_wrong_password(self):
        self.use()
        connection.settings_dict["PASSWORD"] = "wrong"
        with self.assertRaisesRegex(django.db.OperationalError, "authentication failed"):
            self.File.objects.count()


class AutocommitTests(DjangoTestCase):
    """A statement outside of atomic() is a transaction that nothing has begun before it."""

    def test_a_lost_statement_may_have_been_done(self):
        self.assertEqual(self.File.objects.count(), 0)
        self.server.restart()
        self.assertEqual(self.File.objects.count(), 0)
        self.forward.cut("to_client", 0)
        with self.assertRaises(CommitOutcomeUnknown):
            self.File.objects.count()
        self.assertEqual(self.File.objects.count(), 0)

    def test_each_statement_is_committed(self):
        with self.assertRaises(ZeroDivisionError):
            self.File.objects.create(path="stays")
            raise ZeroDivisionError
        self.assertEqual(self.paths(), ["stays"])


class SessionTests(DjangoTestCase):
    def show(self, name):
        with connection.cursor() as cursor:
            cursor.execute(f"SHOW {name}")
            return cursor.fetchone()[0]

    def test_settings_are_there_again(self):
        self.query("DROP ROLE IF EXISTS clerk")
        self.query("CREATE ROLE clerk")
        self.addCleanup(self.query, "DROP ROLE clerk")
        for options, role in (({}, "none"), ({"assume_role": "clerk"}, "clerk")):
            self.use(
                time_zone="Asia/Kathmandu",
                isolation_level=connection.isolation_level.SERIALIZABLE,
                witness=None,
                **options,
            )
            for _ in range(2):
                with transaction.atomic():
                    self.assertEqual(self.show("TimeZone"), "Asia/Kathmandu")
                    self.assertEqual(self.show("role"), role)
                    self.assertEqual(self.show("client_encoding"), "UTF8")
                    self.assertEqual(self.show("transaction_isolation"), "serializable")
                self.server.restart()

    def test_the_isolation_level_is_that_of_transactions(self):
        def work():
            with transaction.atomic():
                levels.append(self.show("transaction_isolation"))
            levels.append(self.show("transaction_isolation"))

        trips, levels = [], []
        for options in ({}, {"isolation_level": IsolationLevel.SERIALIZABLE}):
            self.use(**options)
            work()
            trips.append(self.round_trips(work))
        self.assertEqual(*trips)
        # There nobody is to get it who has the process next.
        self.use(**options, pooled=True)
        work()
        self.assertEqual(levels[:4], ["read committed"] * 4)
        self.assertEqual(levels[4:], ["serializable", "read committed"] * 3)

    def test_a_role_would_stay_with_others_behind_a_pooler(self):
        self.use(assume_role="clerk", pooled=True)
        with self.assertRaisesRegex(ProgrammingError, "assume_role is not possible behind a pool"):
            self.File.objects.count()

    def test_a_pool_is_refused(self):
        self.use(pool=True)
        with self.assertRaisesRegex(ImproperlyConfigured, "take the pool out of OPTIONS"):
            self.File.objects.count()

    def test_queries_are_logged(self):
        with CaptureQueriesContext(connection) as queries, transaction.atomic():
            self.File.objects.filter(path="a").count()
        statements = [query["sql"] for query in queries.captured_queries]
        self.assertRegex(statements[-2], r"SELECT COUNT.*= 'a'")

    def test_a_statement_that_cannot_be_sent_is_logged_as_django_has_it(self):
        with (
            CaptureQueriesContext(connection) as queries,
            self.assertRaises(DjangoDisconnectionError),
            transaction.atomic(),
            connection.cursor() as cursor,
        ):
            with contextlib.suppress(django.db.Error):
                self.lose()
            cursor.execute("SELECT %s", ["a"])
        statements = [query["sql"] for query in queries.captured_queries]
        self.assertIn("QUERY = 'SELECT %s' - PARAMS = ('a',)", statements)

    def test_what_a_wrapper_adds_is_logged(self):
        def with_comment(execute, sql, parameters, many, context):
            return execute(f"/* of a view */ {sql}", parameters, many, context)

        with CaptureQueriesContext(connection) as queries, connection.execute_wrapper(with_comment):
            self.File.objects.count()
        self.assertRegex(queries.captured_queries[-1]["sql"], "^/. of a view ./ SELECT COUNT")

    def test_a_loss_while_queries_are_logged(self):
        with CaptureQueriesContext(connection):
            self.work(self.server.restart)
        self.assertEqual(self.runs, ["run", "run"])

    def test_an_isolation_level_that_there_is_not_is_refused(self):
        self.use(isolation_level=99)
        with self.assertRaisesRegex(ImproperlyConfigured, "Invalid transaction isolation level"):
            self.File.objects.count()


class IteratorTests(DjangoTestCase):
    """iterator() reads by a server-side cursor, in parts."""

    def setUp(self):
        super().setUp()
        for path in "abcde":
            self.work(path=path)

    def files(self):
        return self.File.objects.order_by("path").iterator(chunk_size=2)

    def server_side_cursors(self):
        with connection.cursor() as cursor:
            cursor.execute("SELECT is_holdable FROM pg_cursors")
            return [is_holdable for (is_holdable,) in cursor.fetchall()]

    def test_in_a_transaction(self):
        for options in ({}, {"server_side_binding": True}):
            with self.subTest(options):
                self.use(**options)
                for _ in range(2):
                    with transaction.atomic():
                        files = self.files()
                        self.assertEqual(next(files).path, "a")
                        self.assertEqual(self.server_side_cursors(), [False])
                        self.assertEqual([file.path for file in files], ["b", "c", "d", "e"])
                        self.assertEqual(self.server_side_cursors(), [])
                    self.server.restart()

    def test_in_autocommit_mode(self):
        files = self.files()
        self.assertEqual(next(files).path, "a")
        self.assertEqual(self.server_side_cursors(), [True])
        self.assertEqual([file.path for file in files], ["b", "c", "d", "e"])
        self.assertEqual(self.server_side_cursors(), [])

    def test_the_parameters_are_bound_by_the_client(self):
        # As expressions for the server $1 and $2 are not the same.
        path = Coalesce("path", Value(""))
        files = self.File.objects.order_by(path).distinct().iterator()
        self.assertEqual(len(list(files)), 5)

    def test_a_loss_in_a_transaction(self):
        self.runs.clear()

        def read_with_accident():
            for file in self.files():
                if file.path == "b" and not self.runs:
                    self.runs.append("lost")
                    self.server.restart()
            return file.path

        run = retry_on_disconnect(timeout=30, min_interval=0)(
            transaction.atomic(read_with_accident)
        )
        self.assertEqual(run(), "e")
        self.assertEqual(self.runs, ["lost"])

    def test_a_loss_in_autocommit_mode(self):
        files = self.files()
        next(files)
        self.server.restart()
        with self.assertRaises(django.db.Error):
            list(files)
        self.assertEqual(self.File.objects.count(), 5)

    def test_the_time_zone(self):
        self.use(time_zone="Asia/Kathmandu")
        for zone in ("Asia/Kathmandu", "Asia/Tokyo"):
            connection.ensure_connection()
            connection.timezone = ZoneInfo(zone)
            with transaction.atomic(), connection.chunked_cursor() as cursor:
                cursor.execute("SELECT now()")
                self.assertEqual(cursor.fetchone()[0].tzinfo, connection.timezone)


class CommandTests(DjangoTestCase):
    def test_the_command(self):
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "pack.py").write_text("def pack(): ...\ndef unpack(): ...\n")
            output = io.StringIO()
            self.server.restart()
            call_command("import_files", directory, stdout=output)
        self.assertEqual(output.getvalue(), "pack.py: 2\n")
        names = self.query("SELECT name FROM django_project_definition ORDER BY id")
        self.assertEqual(names, [("pack",), ("unpack",)])

    def test_with_psycopg2(self):
        """Django takes it if psycopg is not installed."""
        database = {**connection.settings_dict, "OPTIONS": {}}
        done = subprocess.run(
            [sys.executable, "-"],
            input=WITHOUT_PSYCOPG.format(database),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stdout, "2 psycopg2\nUTC 1 []\n")
        self.assertEqual(self.paths(), ["2"])


WITHOUT_PSYCOPG = """
import sys
sys.modules["psycopg"] = None
from django.db import connection, transaction
from zreconnect import retry_on_disconnect
from zreconnect.tests import django_project
django_project.configure({{"default": {!r}}})
from zreconnect.tests.django_project.models import File
runs = []

@retry_on_disconnect(min_interval=0)
@transaction.atomic
def work():
    runs.append("run")
    file = File.objects.create(path=str(len(runs)))
    if len(runs) == 1:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    return File.objects.get(pk=file.pk).path

print(work(), connection.Database.__name__)
with connection.chunked_cursor() as cursor:
    cursor.execute("SELECT now(), count(*) FROM pg_cursors WHERE is_holdable")
    now, count = cursor.fetchone()
    print(now.tzinfo, count, connection.queries)
"""


class RestartTests(SurvivesRestarts, DjangoTestCase):
    def test_fifty_restarts(self):
        def applied():
            rows = self.query(
                "SELECT path, count(definition.name) FROM django_project_file file"
                " JOIN django_project_definition definition ON definition.file_id = file.id"
                " GROUP BY file.id"
            )
            self.assertEqual({count for _, count in rows}, {2})
            return [int(path) for path, _ in rows]

        self.survive(
            lambda number: self.record(str(number), ["pack", "unpack"]),
            threads=3,
            applied=applied,
            leave=django_project.forget_connections,
        )
