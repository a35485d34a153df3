"""What each part of zreconnect promises: the page to read first.

A `IReconnectingConnection` is a DB-API connection that outlives its server sessions. It knows
one server, through a driver (`IDriver`), and a policy (`IRetryPolicy`) for how long connecting is
tried. A `IConnectionDescriptor` gives each thread a connection that takes part in the thread's
current `transaction`; `IZopelessTransactionManager` is that for a batch job, and
`IZopeDatabaseAdapter` for a web application.
"""

from __future__ import annotations

import enum

from transaction.interfaces import IDataManagerSavepoint, ISavepointDataManager
from zope.interface import Attribute, Interface
from zope.interface.common.interfaces import IException
from zope.publisher.interfaces import IRetry

IDLE = "idle"
ACTIVE = "active"
PREPARED = "prepared"
DOOMED = "doomed"
CLOSED = "closed"


class Meaning(enum.Enum):
    """What an error says about the connection and the unit of work."""

    DISCONNECT = "the server session has ended, or there was none"
    TRANSIENT = "the session lives, and the same work may succeed when it is run again"
    PERMANENT = "connecting is refused, and will be again"
    USER = "the statement is wrong, or the data"


class IRetryPolicy(Interface):
    """How long and how often connecting is tried."""

    timeout = Attribute("Seconds until `ReconnectTimeout`, or None for ever.")
    initial = Attribute("Upper limit of the first pause between attempts, in seconds.")
    maximum = Attribute("Upper limit of every pause, in seconds.")
    multiplier = Attribute("Growth of the limit from pause to pause.")
    attempts = Attribute("Number of attempts, or None for any number.")
    fails_fast = Attribute("Whether one failed attempt is a `DisconnectionError`.")
    since_outage = Attribute("Whether the timeout counts from when the outage was first met.")

    def longest_attempt(elapsed):
        """The seconds that an attempt may take which starts ``elapsed`` seconds after the first."""

    def after(elapsed):
        """The policy for the time that is left when ``elapsed`` seconds of it have passed."""

    def attempt_limit(elapsed):
        """The seconds that it is given, which differ from time to time."""

    def is_over(attempt, elapsed):
        """Whether no other attempt follows upon the one with that number, from 1, that failed.

        elapsed: seconds since the first one began.
        """

    def pause(attempt, elapsed):
        """The seconds between that attempt and the next one, drawn at random."""


class IDriver(Interface):
    """All that differs between database modules; `zreconnect.testing.DriverConformance` tests it.

    A *raw connection* is the module's own. A driver keeps nothing about one: every method can be
    called by any thread, for one raw connection by one thread at a time. From `prepare` on, a
    statement outside a transaction is a transaction of its own; `begin` begins one that lasts until
    `commit` or `rollback`.

    A method that talks to the server may raise the module's errors, derived from its ``Error``,
    also for a lost session; the caller asks `meaning` about them. Anything else that is raised, by
    the raw connection and its cursors too, is taken for a mistake in the program and passed on.
    Where nothing is said of a round trip, the method may make one or more, but not on the path of a
    healthy transaction. `BaseDriver` in ``zreconnect.drivers.base`` has what most drivers do alike.
    """

    name = Attribute("The name that ``connect(driver=...)`` takes.")
    module = Attribute(
        "The DB-API 2.0 module, with its exceptions, which mean what PEP 249 has them mean: a "
        "statement without the right to it, or with a wrong name, raises its ProgrammingError, a "
        "value that cannot be converted its DataError."
    )
    disconnection_error = Attribute(
        "Subclass of `zreconnect.DisconnectionError` and of the module's OperationalError, in this "
        "order, at the top of a module, so that it can be pickled."
    )
    has_sessions = Attribute(
        "Whether there is a server, whose sessions can be lost. Without one, no witness is asked."
    )
    loses_rows = Attribute(
        "Whether rows that are in the client cannot be fetched any more when the session has ended."
    )
    supports_two_phase = Attribute("Whether transactions can be prepared.")
    pooling = Attribute("What is to be minded behind a pooler, an `IPooling`; None if nothing is.")
    calls_autocommit = Attribute(
        "Whether the module's connections have ``autocommit`` as a method, and not as an attribute,"
        " and a statement can switch it."
    )
    refused_methods = Attribute(
        "The names of the raw connection's methods that work around its transaction, such as those "
        "that execute statements without a cursor. They are not handed on."
    )
    committing_methods = Attribute(
        "The names of methods of the raw connection and its cursors that commit what came before."
    )
    choosing_methods = Attribute(
        "The names of methods of the raw connection that choose something for the session, which "
        "`keep` and `restore` bring over to the next one."
    )
    may_chain = Attribute(
        "Whether ``chains()`` is to be asked about a string without semicolons: a function of C's, "
        "such as a pattern's ``match``."
    )
    rollback_request = Attribute(
        "The module's exception that only ends a block of ``transaction()`` and undoes it, as "
        "psycopg's Rollback; an empty tuple if it has none."
    )
    quote = Attribute("What encloses names in statements.")
    ledger_table = Attribute(
        "The statement that makes a `Ledger`'s ``{table}``, unless it exists. It has ``id``, the "
        "key, a UUID or its 36 characters; ``number``, an integer of 64 bits, 0 where it is not "
        "given; and ``used``, a time, then now."
    )
    ledger_conflict = Attribute(
        "What follows upon the ledger's INSERT, and is followed by assignments, to have them made "
        "in a row of that id if there is one."
    )
    ledger_isolation = Attribute(
        "The isolation level for what is done in the ledger outside the program's transactions, in "
        "which others' changes of it are no error; None for the session's own."
    )
    ledger_free = Attribute(
        "What has a query of a row of the ledger leave out one that is locked; empty if there is "
        "no such thing."
    )
    ledger_writer = Attribute(
        "What tells, of a row of the ledger, the id of the transaction that has written it last, "
        "also if that is under way; None if there is no such thing."
    )

    # Where to connect to. None of these but `connect` talks to a database server.

    def parse(dsn):
        """The connection parameters in ``dsn``, for `connect` and `address`: strings by name.

        Raises ValueError, which quotes nothing of the DSN, if it cannot be parsed, or if no server
        could make a connection of it.
        """

    def address(parameters):
        """The server's address for people, without password. Raises nothing."""

    def places(parameters):
        """The parameters for each place at which the server may be, in the order to try them.

        Several hosts are several places, and so are several addresses of one name, when this is
        called with the parameters of one of these again. ``[parameters]`` if there is nothing to
        choose. May ask name servers. Raises nothing.
        """

    def connect(parameters, timeout):
        """A new raw connection, which may be used by another thread than the calling one.

        timeout: seconds for the attempt, from connecting to the server's last word. It may be
        rounded up, for the caller goes on without the attempt when they are over; but the attempt
        has to end. Raises the module's errors or OSError, whatever it is that answers.
        """

    def connect_meaning(error, parameters):
        """What an error of connecting means: DISCONNECT (try again) or PERMANENT.

        error: raised by `connect` or a connection factory, or a TimeoutError of the caller's, which
        is to be tried again. PERMANENT is what waiting does not change: a wrong password, role or
        database, a mistake. Raises nothing.
        """

    def parameters(raw):
        """The parameters that ``raw`` was connected with, for `address`; no password.

        Called once for a connection factory, with its first raw connection.
        """

    # A session

    def prepare(raw):
        """Bring a new raw connection into the form that the driver's other methods expect.

        Called once, also for what `connect` returned. Raises TypeError for what is no connection
        of the module, and the module's ProgrammingError for one that cannot be used: in a
        transaction, in autocommit mode or asynchronous.
        """

    def encrypted(raw, parameters):
        """The parameters for the sessions that follow upon ``raw``, if that one is encrypted.

        With them no session begins without encryption, whatever the server, or who answers in its
        place, says. None if ``raw`` is not encrypted, or nobody tells. Called for each new session,
        after `prepare`; it may take a round trip if encryption is possible. What has been asked for
        is not weakened, wherever the module has it from.
        """

    def keep(raw):
        """What the user has set on a raw connection itself, such as type adapters; for `inherit`.

        Talks to nobody: the session may have ended. None if there is nothing.
        """

    def inherit(raw, kept):
        """Give a new raw connection, before ``on_connect`` sees it, what `keep` has taken from an
        earlier one."""

    def restore(raw, settings, replaced):
        """Give a raw connection the session settings of an earlier one, outside a transaction.

        settings: `SessionSettings`. The modes that `begin` states itself are set only for
        autocommit mode, and taken back after it. replaced: a dictionary, empty for a new session,
        for what they have replaced. Called for each new session, after ``on_connect``, and after
        each change.
        """

    def isolation_level(level):
        """The module's constant for an isolation level, given as constant or as SQL spells it.

        None, unless the module means something else by it, and "DEFAULT" stand for the server's
        own: None. Raises ValueError for an unknown level. No round trip.
        """

    def set_client_encoding(raw, encoding):
        """Set the encoding of the session. Raises the module's error for an unknown one."""

    def has_client_encoding(raw, encoding):
        """Whether that is the encoding of the session already, as far as its name tells. No round
        trip. Raises nothing."""

    def set_cursor_factory(raw, factory):
        """Set the class of cursors for which none is given; None for the usual one. No round
        trip."""

    def fileno(raw):
        """The file descriptor of the session's socket; None if there is none. No round trip.

        When another thread shuts that socket down, a statement that waits for its answer has to
        raise the error of a lost session.
        """

    def misses_target(raw, parameters):
        """Whether the server is not, or no longer, of the kind that ``parameters`` ask for.

        Needs no round trip, and knows of a change when the server has answered a request since.
        Raises nothing.
        """

    def close(raw):
        """Close a raw connection, whatever state it is in, also twice. Raises nothing."""

    def abandon(raw):
        """Give up a raw connection that belongs to the parent process.

        Sends the server nothing and leaves the parent's session as it is, also when the child
        ends. Raises nothing.
        """

    # Transactions

    def begin(raw, settings, rider=""):
        """Begin a transaction with the modes in ``settings``, in one round trip.

        rider: a statement that is sent along. Its row is returned, a tuple, or None if it has none.
        """

    def begins_read_only(raw, settings):
        """Whether `begin` asks for a read-only transaction. No round trip. Raises nothing."""

    def commit(raw, rider=""):
        """Commit, in one round trip.

        rider: a statement that is sent along before COMMIT, which is not executed if it fails; not
        sent in a transaction that has failed.
        Raises the module's errors; its InternalError also if the server rolled back because a
        statement had failed. If the transaction goes on after an error, `in_transaction` says so,
        and `commit` can be called again.
        """

    def rollback(raw):
        """Roll back, in one round trip. Also right if the server has done so already, or if rows
        have not been read."""

    def prepare_transaction(raw, gid):
        """Prepare the transaction for a two-phase commit. Raises the module's errors.

        gid: its name.
        """

    def own_transaction(raw):
        """Let the module itself know of the transaction that `begin` began.

        Some features of a module work only in transactions that it began itself. Afterwards
        `commit` and `rollback` work as before.
        """

    def in_transaction(raw):
        """Whether the server session is in a transaction. Needs no round trip. Raises nothing.

        If it is not after an error inside a transaction, the server has rolled the transaction
        back by itself, as MySQL does with the victim of a deadlock; the connection then refuses
        what follows. True while the answer to a statement of a transaction is not complete.
        """

    def is_at_rest(raw):
        """Whether the session waits for a request, and what `in_transaction` says is certain.

        Not while a statement is under way or its answer not read to the end, as after an interrupt,
        nor when the session is known to be lost. It is asked after an exception that is none of the
        module's; False, where nobody can tell, ends the session. Needs no round trip. Raises
        nothing.
        """

    def autocommit_mode(query):
        """The mode, True or False, to which a statement switches the session, if it does nothing
        else; None for any other one. Called if `calls_autocommit` is true. Raises nothing."""

    def has_committed(raw):
        """Whether a statement may have committed what came before it in the transaction, as DDL
        does in MySQL, so that no witness knows what became of the rest. No round trip. Raises
        nothing, also if the session is lost."""

    def in_failed_transaction(raw):
        """Whether a statement of the transaction has failed, so that it can only be rolled back.
        Needs no round trip. Raises nothing."""

    def has_written(raw, but_for=None):
        """Whether the present transaction has written anything, or may have.

        but_for: the name of a table that does not count. One round trip, also where nothing is
        known of it and the answer is True; it shows that the session is there. Raises the module's
        errors, also if a statement of the transaction has failed.
        """

    # Statements

    def query(raw, statement, parameters=None):
        """Execute a statement of zreconnect's own, in one round trip, and return its rows: tuples
        in a list, which is empty for a statement that has none.

        statement: marks parameters with ``%s``, whatever the module's paramstyle; with transaction
        ids it may be several, with semicolons between, of which the last one has the rows. Cursor
        classes and row factories of the user's have no say in it.
        """

    def transaction_flag(raw):
        """What can be called after each statement, because it costs no round trip and no Python
        call: it is false if the server has said that there is no transaction. So a COMMIT is found
        out that the program executes itself, after which its work may not be run again."""

    def attribute(raw, name):
        """An attribute of the raw connection, or of a raw cursor or another object of the module,
        as a program is to see it that has begun its transaction here and not there. Raises
        AttributeError. No round trip."""

    def check_cursor(name, options):
        """Raise what the module raises for such a cursor at once; there may be no session yet."""

    def cursor(raw, name, options):
        """A new raw cursor. No round trip.

        name: makes it a server-side cursor; None for an ordinary one. Raises the module's
        NotSupportedError if it has none. options: those that the module's ``cursor()`` takes, and
        ``cursor_factory``.
        """

    def hand_out(raw):
        """Called before a function of the program's uses the raw connection by itself. No round
        trip; note what would not show afterwards, as far as `has_committed` is to tell it."""

    def is_commit(raw_cursor):
        """Whether the statement that ``raw_cursor`` sent last may be a COMMIT, or be committed by
        itself. No round trip, for the session is lost."""

    def sets_modes(statement):
        """Whether a statement, as text or composed, has to be the first one of its transaction,
        before any query: SET TRANSACTION and its like. It is what the program has handed over,
        whatever that is. No round trip."""

    def chains(statement):
        """Whether a statement, as text or composed, ends the transaction and goes on in another
        one: COMMIT AND CHAIN, or a string in which something follows COMMIT. No round trip; False
        if ``has_committed()`` tells of it."""

    def rows_at_hand(raw_cursor):
        """How many rows an iteration may fetch at a time: those that a round trip brings, or some
        of those that have arrived; 1 if each may have to be waited for, or if the class of the
        cursor has an iteration of its own."""

    def looks_like_reading(raw_cursor):
        """Whether the statement that ``raw_cursor`` executed last is of a kind that writes nothing,
        most often; False where that is not known, but with transaction ids a plain SELECT has to
        be. No round trip."""

    # Errors. None of these talks to the server or raises anything.

    def meaning(error, raw):
        """What an error of a statement means, a `Meaning`.

        raw: the raw connection; its state decides first, then SQLSTATE, then the message.
        """

    def is_transient(error):
        """Whether ``error`` is of the module's, the session lives, and the same work may succeed
        when run again; False for every other exception."""

    def condition(error):
        """The `Condition` that an error of a statement of zreconnect's own tells, or None.

        UNDEFINED_OBJECT and OBJECT_NOT_IN_PREREQUISITE_STATE are needed if `supports_two_phase`.
        """

    def is_refused_by_standby(error, raw, is_old_news=False):
        """Whether ``error`` says that the server takes no writes, as one that was a primary.

        Not if the connection was to lead to such a server. is_old_news: whether what the session
        tells of the server does not count for the transaction: a pooler repeats what the first
        server has said, and one that was a standby is promoted.
        """

    # After a loss. Without sessions, none of these is called.

    def is_standby(raw):
        """Whether the server is one that replays another one's writes, as its last answer has it;
        False where that is not known. No round trip. Raises nothing."""

    def takes_writes(raw):
        """Whether the server takes writes, as far as it knows. One round trip, after a session was
        lost by an error for which `is_refused_by_standby` is true, and before it is asked what
        became of a transaction."""

    def has_transaction_ids(raw):
        """Whether the server tells transactions' ids, and what became of them, as PostgreSQL does
        with ``pg_current_xact_id()`` and ``pg_xact_status()``. `identify` then has to give the
        `History`, in the server's own words, without which an id proves nothing. Without ids, a
        lost COMMIT is looked up in a `Ledger`, or not at all."""

    def identify(raw):
        """What the server knows the session by, a `ServerSession`.

        Called outside a transaction: of a new session, and of one in which an outcome is looked up.
        It is right inside one as well, where the tests call it; in one that has failed it may raise
        the module's error.
        """

    def end_session(raw, session, evidence):
        """Tell the server to end the session that holds a transaction; whether there was one.

        session: the one in which the transaction was begun. evidence: an `Evidence`, of which a
        driver uses what it needs to be certain: what may be somebody else's, to whom a pooler has
        given the session, is left alone, and so is the session that ``raw`` has. Returns without
        waiting for its end, and is called again until it returns False. True also for one that may
        be seen and not ended.
        """

    def full_name(raw, table):
        """The name that leads to ``table`` whatever the session's path or selected database is.

        table: the name, which needs no quoting, with or without a schema. None if it leads to
        nothing.
        """

    def limit_lock_waits(raw, limit):
        """Limit how long the statements of a transaction, which has begun, wait for locks.

        limit: seconds, which may be rounded up. What is not given in time raises an error whose
        `condition` is LOCK_NOT_AVAILABLE. Returns None if the limit ends with the transaction; else
        the one before, with which the caller calls this again afterwards.
        """


class IPooling(Interface):
    """What is to be minded behind a pooler, where others have the server's processes as well."""

    def is_in_between(raw):
        """Whether there is a pooler: it has given the session a number of its own, which is not
        that of its server process. One that passes the server's on is not found out; what only
        forwards, as HAProxy does, has none of its own, and pgpool-II's are those of its servers.
        One round trip, or two."""

    def share(raw):
        """Have the module leave nothing by itself in the server processes of a new session. No
        round trip."""

    def check_parameters(parameters):
        """Raise ValueError for connection parameters that a pooler has none of."""

    def check_settings(settings):
        """Raise the module's ProgrammingError for `SessionSettings` that would stay in a server
        process."""

    def check_statement(statement, options):
        """Raise the module's ProgrammingError for a statement whose purpose is to stay there.

        statement: as text or composed. options: those of its cursor.
        """

    def is_read_only(statement):
        """Whether a transaction takes no writes after a statement that sets its modes."""

    def check_set_up(raw, pooled, what):
        """Raise the module's ProgrammingError if others have the session's processes.

        pooled: as for `connect`. what: what was to be set up in it.
        """


class IPipeliningDriver(IDriver):
    """A driver that can begin a transaction along with its first statement."""

    answers_begin = Attribute(
        "Whether `begin_with` gives the answers to BEGIN and its rider, and when they come."
    )
    returns_cursor = Attribute("Whether the cursor's ``execute()`` returns the cursor.")

    def may_begin_with(raw, raw_cursor, query, parameters=None):
        """Whether a statement means the same when it travels along with BEGIN.

        Needs no round trip. Raises what the module raises for a query that it cannot read.
        """

    def begin_with(raw, raw_cursor, settings, rider, arguments, options, answered=None):
        """Begin a transaction and execute its first statement, in one round trip.

        rider: as in `begin`; if it fails, the statement must not be executed.
        arguments, options: those of the raw cursor's ``execute()``.
        answered: to be called with what the rider has returned, or None, when it is answered; None
        if ``answers_begin`` is false.

        Returns what the rider has returned, or None, and what the statement has raised, or None;
        None instead of both if BEGIN or its rider has failed, so that the server has not
        executed the statement, and the session is in no transaction. Raises the module's errors of
        a lost session, which may have executed the statement.
        """


class IWitness(Interface):
    """A way to find out whether a transaction was committed whose COMMIT had no answer."""

    def observer(driver):
        """A new `IObserver` for one connection."""


class IObserver(Interface):
    """Records what a connection does, for the case that it loses the answer to a COMMIT.

    What it knows is of the last session and its last transaction, until `record_session` is called.
    """

    watches_statements = Attribute("Whether `executed` wants to know of each statement.")
    may_have_committed = Attribute(
        "Whether a COMMIT of the transaction may have left, by `commit`, that has something to "
        "commit: until then, losing the session rolls back. If not, the work may run again, and "
        "`outcome` must not be asked."
    )
    waits = Attribute(
        "Whether nothing may go along with BEGIN, because the transaction's first statement must "
        "come first. Set before the transaction begins; `commit` then records what the rider would."
    )
    is_replaced = Attribute(
        "Whether a statement of the program's has ended the transaction, or may have, so that what "
        "is committed is another one. Set when it does, and when the session ends."
    )
    history = Attribute(
        "The `zreconnect.history.History` of the last session whose server told one, or None."
    )

    takes_writes = Attribute(
        "Whether the transaction that is under way has shown that its server takes writes."
    )
    is_elsewhere = Attribute(
        "Whether the last transaction has shown another history than that of the session; then the "
        "session is recorded again before the next one goes on."
    )

    def record_session(raw, settings):
        """Record the session. Returns a `zreconnect.history.Change` if the server goes on in
        another history than that of the last session, or without what was acknowledged there; else
        None. Raises the driver's errors."""

    needs_row = Attribute("Whether `began` has to be told at once what the rider has returned.")

    def rider(raw, settings, along=False):
        """The statement that goes along with BEGIN, or an empty string.

        along: whether the program's first statement goes along, too.
        """

    def began(row):
        """The transaction has begun. row: what the rider returned, or None."""

    def handed_out():
        """The program has got the session's raw connection, and what it executes with it from now
        on is not seen."""

    def executed(raw_cursor):
        """A statement of the transaction was executed; None if it is not known which."""

    def commit(raw):
        """Commit, after recording what is known only now. Raises the driver's errors."""

    def acknowledged():
        """The transaction is committed, by somebody else than `commit`."""

    def rollback(raw):
        """Roll back. Raises the driver's errors."""

    def has_written(raw):
        """Whether the present transaction has written anything of the program's, or may have.

        Asks the server. Raises the driver's errors.
        """

    def fence(raw):
        """End the transaction's session on the server, so that it can neither commit late nor hold
        locks; wait until it has ended, for a while. Nothing if no transaction was under way."""

    def outcome(raw):
        """What became of the transaction, an `Outcome`. Call `fence` before."""

    def describe():
        """What a person needs to find it out by hand."""

    def leave_evidence():
        """As `describe`, for a person who will look: nothing changes any more what it names."""

    xid = Attribute("The transaction's id in PostgreSQL, if it is known, or None.")

    def close(raw):
        """The connection ends; take away what was written down."""


class IReconnectingConnection(Interface):
    """A DB-API 2.0 connection that reconnects when a transaction begins.

    Its state is one of

    - ``idle``: no transaction; there may be a server session or not;
    - ``active``: a transaction is under way;
    - ``prepared``: a two-phase commit is between its phases; what needs the server, and
      ``rollback()``, raises the driver's ProgrammingError, but for ``tpc_commit()`` and
      ``tpc_rollback()``;
    - ``doomed``: the transaction's session was lost, or it could not begin for a statement;
      everything but ``rollback()`` and ``close()`` raises: `DisconnectionError`;
      `CommitOutcomeUnknown` if the transaction may be committed; or the driver's InternalError if
      beginning was refused;
    - ``closed``: everything but ``close()`` raises the driver's InterfaceError.

    Threads can share it: a transaction belongs to the thread that began it, and statements of other
    threads wait until it has ended. After the seconds of the policy's timeout, or 60 if it has
    none, they raise the driver's OperationalError. What they have waited is a part of the timeout.
    The transaction of a thread that has ended is rolled back when the next one has its turn; if
    that calls ``commit()``, the driver's ProgrammingError tells. A connection that is one thread's
    for good, as those of a `IConnectionDescriptor` are, raises the driver's ProgrammingError in
    other threads.

    Whatever talks to the server can raise `DisconnectionError`: when the session is lost inside a
    transaction, and when a policy that fails fast gets no connection. Whatever begins a
    transaction can raise `ReconnectTimeout`, and the driver's OperationalError if connecting is
    refused for good, as for a wrong password. The driver's other errors pass unchanged, but a
    serialization failure and a deadlock are ``transaction.interfaces.TransientError`` as well.

    An exception that is not the server's answer, such as KeyboardInterrupt or that of a signal
    handler, passes as it is, at whatever moment it comes. If it leaves the session in the middle of
    an answer, the session is ended, and a transaction in it is doomed. After ``rollback()`` the
    connection can be used as before.

    All that the driver's connection has and that is not listed here works too and is passed on
    to it.
    """

    state = Attribute("``idle``, ``active``, ``prepared``, ``doomed`` or ``closed``.")
    closed = Attribute(
        "0 while the connection can be used, 1 after ``close()``, and 2 from the loss of a "
        "transaction's session until ``rollback()``."
    )
    server = Attribute("The server's address, without password.")
    driver_connection = Attribute("The driver's own connection; connects if there is none.")
    autocommit = Attribute(
        "True: each statement is a transaction of its own. If the session has ended while idle, a "
        "statement reconnects; one that loses it dooms nothing and raises `CommitOutcomeUnknown`, "
        "and the next one reconnects."
    )
    isolation_level = Attribute("As the driver has it. It holds for later transactions.")
    readonly = Attribute("As the driver has it. It holds for later transactions.")
    deferrable = Attribute("As the driver has it. It holds for later transactions.")
    cursor_factory = Attribute("The driver's cursor class for new cursors.")

    def cursor(name=None, cursor_factory=None, **options):
        """A new `IReconnectingCursor`. Nothing is sent to the server.

        name: makes it a server-side cursor. options: those of the driver's ``cursor()``.
        """

    def begin():
        """Begin a transaction; reconnect, for as long as the policy says, if need be.

        Raises the driver's ProgrammingError inside a transaction.
        """

    def commit():
        """Commit the transaction. Does nothing if there is none.

        If the session is lost before the answer arrives, the connection reconnects and looks the
        outcome up: if the transaction was committed, ``commit()`` returns; if not, it raises
        `DisconnectionError`; if that cannot be found out, `CommitOutcomeUnknown`. Raises the
        driver's InternalError if a statement had failed, so that nothing was committed; the
        driver's ProgrammingError if the transaction belongs to a transaction manager or to another
        thread.
        """

    def rollback():
        """Roll back and be idle, also after a disconnect. Does nothing if the thread has no
        transaction.

        Never fails because of a lost connection. Raises `CommitOutcomeUnknown`, and is idle all the
        same, if an exception has interrupted ``commit()``, or a statement that may have committed,
        or was raised in the place of that error, and the transaction is committed, or may be. For
        that it asks the server, which takes 10 seconds at most if it cannot be reached.
        """

    def close():
        """Close the session for good. What was not committed is rolled back."""

    def call_driver(function, *args, **keywords):
        """Call a function that wants the driver's own connection or cursor, and return its result.

        In the arguments, this connection and its cursors are replaced by the driver's own, such as
        in ``connection.call_driver(register_hstore, connection)``. A transaction begins for it as
        for a statement. A loss is what it is for a statement: `DisconnectionError`, or in
        autocommit mode `CommitOutcomeUnknown`. What the function raises besides passes. All that
        it does counts as one request, for ``response_timeout``.

        The transaction is not the function's to end; if it has, that is seen on PostgreSQL and
        SQLite unless it has begun another one. The modules for MySQL do not tell: there, a loss in
        the rest of the transaction is a `CommitOutcomeUnknown`, and nothing of it is run again.
        """

    def tpc_begin(xid):
        """Begin a transaction that the program commits in two phases, as in PEP 249.

        xid: its name, from the driver's ``xid()`` or as a string, for all of them; not one that is
        used again. Until it has ended, ``commit()`` and ``rollback()`` raise the driver's
        ProgrammingError. Raises what ``begin()`` raises; the driver's ProgrammingError in
        autocommit mode and if the connection takes part in a transaction manager's transactions;
        its NotSupportedError if it knows no prepared transactions.
        """

    def tpc_prepare():
        """Prepare it, and be ``prepared``.

        If the session is lost before the answer arrives, the connection reconnects and looks
        whether it is prepared; if not, this raises `DisconnectionError`; if that cannot be found
        out, `CommitOutcomeUnknown`. In both cases ``tpc_rollback()`` is to be called. Raises the
        driver's ProgrammingError outside such a transaction.
        """

    def tpc_commit(xid=None):
        """Commit what is prepared; or in one phase, as ``commit()``, what is not.

        If the session is lost meanwhile, the connection reconnects and commits what is still
        prepared, or looks the outcome up. Raises `CommitOutcomeUnknown` if that is not possible in
        the policy's time, and can be called again then; the driver's OperationalError if somebody
        has rolled it back.

        xid: that of a transaction which anybody has prepared, to be ended from outside of any
        transaction. If the session is lost meanwhile: `CommitOutcomeUnknown`, which says whether it
        is still prepared. Raises the driver's ProgrammingError if there is none.
        """

    def tpc_rollback(xid=None):
        """Roll it back, prepared or not; also after a disconnect.

        Raises the driver's OperationalError, and is idle all the same, if what may be prepared
        could not be ended in the policy's time; `CommitOutcomeUnknown` if ``tpc_commit()`` was
        interrupted and it is committed, or may be. xid: as for ``tpc_commit()``, but
        `DisconnectionError` if it is still prepared after a loss.
        """

    def tpc_recover():
        """The names of what is prepared, a list of the driver's. Reconnects if need be."""

    def savepoint():
        """Set a savepoint inside the transaction, which begins as with any statement.

        Returns an object with ``rollback()`` and ``release()``. Raises the driver's
        ProgrammingError in autocommit mode, outside a transaction.
        """

    def transaction(savepoint_name=None, force_rollback=False):
        """A context manager that begins, gives a cursor, and commits, or rolls back on an error.

        Inside a transaction, whoever has begun it, and in one that is a transaction manager's, it
        sets a savepoint, and releases it at the end of the block, or rolls back to it on an error.
        As long as such a block has not ended, nothing is committed: the driver's ProgrammingError.

        savepoint_name: the savepoint's, which is then set in any case. MySQL has but one of a name.
        force_rollback: roll back at the end of the block, too. psycopg's ``Rollback`` that is
        raised in the block ends it, or the block whose cursor it was given, and rolls that back.

        Raises what ``begin()``, a statement and ``commit()`` raise; the driver's ProgrammingError
        at the end of a block that is inside another one and ends after it, and of one whose
        transaction was ended within, and another one was begun: that goes on; TypeError for a name
        that is no string.
        """

    def run(function, *args, attempts=3, timeout=None, **keywords):
        """Begin, call ``function(*args, **keywords)``, commit, and return what it returned.

        After a disconnect or a transient error (a serialization failure or deadlock) all of this
        is done again, unless something was committed within, also through another connection of
        zreconnect's or one of SQLAlchemy's.

        attempts: how often it is tried at least. timeout: seconds for which it is done again in any
        case, however many attempts that takes, so that a line that comes and goes does not use
        them up. Each attempt waits for its connection as long as the policy says, besides.

        Raises what the last attempt raised; `CommitOutcomeUnknown` and `ReconnectTimeout` at once;
        TypeError or ValueError, naming the argument, for one that makes no sense, and TypeError for
        a generator or coroutine function, which would do its work after the commit.
        """

    def transactional(attempts=3, timeout=None):
        """A decorator that makes each call of a function a transaction, as ``run`` does.

        A call inside a transaction that the thread has begun explicitly, by another such function,
        by ``run``, ``transaction`` or ``begin``, is a part of that one, and runs again only along
        with it. attempts, timeout: as for ``run``. Raises ValueError or TypeError, naming the
        argument, for one that makes no sense, and TypeError for a generator or coroutine function.
        """

    def fork():
        """A new connection to the same server with the same settings, independent of this one."""


class IReconnectingCursor(Interface):
    """A DB-API 2.0 cursor that outlives its server sessions.

    After ``rollback()`` of a lost transaction the same cursor executes again. The errors are those
    of `IReconnectingConnection`. All that the driver's cursor has works too and is passed on.
    """

    connection = Attribute("The `IReconnectingConnection`.")
    name = Attribute("The name of a server-side cursor, or None.")
    arraysize = Attribute("Number of rows that ``fetchmany()`` fetches.")
    itersize = Attribute("Number of rows that iterating a server-side cursor fetches at once.")

    def execute(query, vars=None, **options):
        """Execute a statement; it begins a transaction if there is none.

        options: those that the driver's ``execute()`` takes.
        """

    def executemany(query, *parameters, **options):
        """Execute a statement for each of the parameters in a sequence, which has the name that
        the driver gives it."""

    def callproc(procname, *parameters, **options):
        """Call a stored procedure, with a sequence of parameters as the driver takes it."""

    def fetchone():
        """The next row, or None."""

    def fetchmany(size=None):
        """The next ``size`` rows."""

    def fetchall():
        """All rows that are left."""

    def close():
        """Close the cursor."""


class ITransactionDataManager(ISavepointDataManager):
    """Makes the commit of a connection part of the commit of a `transaction`."""

    disconnected = Attribute("Whether the session was lost since the transaction began.")

    def should_retry(error):
        """Whether the unit of work may run again after ``error``."""


class ISavepoint(IDataManagerSavepoint):
    """A savepoint inside a transaction of a connection."""

    def release():
        """Forget the savepoint and keep what was done since."""


class IConnectionDescriptor(Interface):
    """A class attribute whose value is the calling thread's `IReconnectingConnection`.

    Its transactions are part of the thread's current `transaction`.
    """

    def connection():
        """The calling thread's connection. Raises the driver's InterfaceError after ``close()``."""

    def set_isolation_level(level):
        """As `IZopelessTransactionManager.set_isolation_level`."""

    def close():
        """Close the calling thread's connection; no thread gets one any more.

        The connections of other threads are closed when these threads end.
        """


class IZopelessTransactionManager(Interface):
    """Transactions for a program outside Zope; made by `initZopeless`."""

    implicitBegin = Attribute(
        "False: only ``begin()`` begins a transaction. None or True (deprecated): one begins "
        "after each commit and abort, and touches the database with its first statement."
    )

    def begin():
        """Begin a transaction, and keep connecting until there is one.

        Raises `ReconnectTimeout` after the manager's timeout, `AlreadyInTransaction` inside a
        transaction, and the driver's OperationalError if connecting is refused for good.
        """

    def commit():
        """Commit the current `transaction`.

        Raises `DisconnectionError` if the connection was lost before, `CommitOutcomeUnknown` if
        it is lost while COMMIT is under way, and what other data managers raise.
        """

    def abort():
        """Abort the current `transaction`. Never fails because of a lost connection.

        Raises `CommitOutcomeUnknown` if an exception has interrupted ``commit()`` and the
        transaction is committed, or may be.
        """

    def run(function, *args, attempts=3, timeout=None, **keywords):
        """Begin, call ``function(*args, **keywords)``, commit, and return what it returned.

        As `IReconnectingConnection.run`, for a transaction of the manager's.
        """

    def connection():
        """The calling thread's `IReconnectingConnection`."""

    def cursor(name=None, cursor_factory=None, **options):
        """A new cursor of the calling thread's connection, as `IReconnectingConnection.cursor`."""

    def set_isolation_level(level):
        """Use this isolation level for the calling thread's later transactions, and for those of
        threads that have not used a connection yet.

        Raises the driver's ProgrammingError inside a transaction, ValueError for an unknown level.
        """

    def uninstall():
        """End the current transaction, close the connection and take ``_connection`` away."""


class IZopeCursor(IReconnectingCursor):
    """A cursor of an `IZopeConnection`; its rows are lists."""


class IZopeConnection(IReconnectingConnection):
    """A thread's connection from a database adapter; its work is part of a `transaction`.

    It joins the current transaction when ``cursor()`` is called or a statement begins one.
    ``commit()`` is the transaction manager's to call, and raises the driver's ProgrammingError.
    """

    def registerForTxn():
        """Join the current transaction, if that has not been done."""

    def getTypeInfo():
        """The `IZopeDatabaseAdapter` that the connection belongs to."""


class IZopeDatabaseAdapter(Interface):
    """Gives each thread a connection that takes part in its transactions."""

    paramstyle = Attribute("How the driver marks parameters, as in PEP 249.")
    threadsafety = Attribute("What threads may share, as in PEP 249: the adapter, no connection.")

    def __call__(transaction_manager=None):
        """The calling thread's `IZopeConnection`.

        transaction_manager: whose current transaction it takes part in, such as ``request.tm``;
        None stands for ``transaction.manager``. Raises the driver's ProgrammingError if the
        connection is in a transaction of another one.
        """

    def isConnected():
        """Whether the calling thread has a session, as far as that is known without asking."""

    def getConverter(type):
        """A function that converts a result of this type: the driver has done so already, so that
        it returns what it is given."""

    def getEncoding():
        """The client encoding that was set, or None for the server's own."""

    def setEncoding(encoding):
        """Use this client encoding, in sessions that begin later."""


class IManageableZopeDatabaseAdapter(IZopeDatabaseAdapter):
    """A database adapter that can be told where its database is."""

    dsn = Attribute("What ``getDSN()`` returns; not to be shown, for it may have a password.")
    server = Attribute("The server's address, without password.")

    def getDSN():
        """The data source name, with its password."""

    def setDSN(dsn):
        """Use another data source name, each thread from its next transaction on.

        Raises TypeError or ValueError, which does not quote it, if it makes no sense; then the
        adapter is as before.
        """

    def connect():
        """Open the calling thread's session, unless there is one.

        Raises `DisconnectionError` or `ReconnectTimeout` if that is not possible now, and the
        driver's OperationalError if it is refused for good.
        """

    def disconnect():
        """End the calling thread's session, and what it has not committed; those of the other
        threads end before their next transactions. Whoever uses the adapter then reconnects."""


class IRetryOnDisconnect(Interface):
    """What is promised of a function that `retry_on_disconnect` decorates.

    It is run again, until it returns or the time is up, after

    - `DisconnectionError`, except for a request on a connection that had been lost before the run:
      that one waits for a rollback that the function leaves to somebody else;
    - `ReconnectTimeout`;
    - SQLAlchemy's ``DBAPIError`` of a lost connection or of a failure to connect, also of engines
      that zreconnect does not serve;
    - `CommitOutcomeUnknown`, if it is idempotent.

    If a run has committed a transaction, or may have, it is run again only if it is idempotent.
    What is known of that: the commits of zreconnect's connections and of SQLAlchemy's engines, and
    statements in autocommit mode, in the thread that runs the function; not a COMMIT that it sends
    as a statement of its own, nor, on MySQL, a statement that commits by itself.

    Every other error is raised at once. So are serialization failures and deadlocks, which want
    short pauses of random length: ``run()`` of a connection handles them, and can be used inside.
    So are the errors of a database module that is used directly, since they do not tell a lost
    COMMIT from a lost statement.

    When the time is up, or a run may have committed, its error is raised, with a note of how often
    and how long the function was run, where Python has notes, and `IGaveUpRunning` is announced.
    Each further run is announced by `IRunAgain`.

    A decorated function that is called inside another one is run once: running it again is left to
    the outermost one.
    """

    def __call__(*args, **keywords):
        """What the function returns."""


# Extends IException, and comes before IRetry below, so that a view for it comes before one that a
# site has for all exceptions.
class IDatabaseUnavailable(IException):
    """An error that means: the database could not be reached, or was lost, and may come back.

    A web server answers it with 503 Service Unavailable. It is provided by `DisconnectionError`, by
    the original exception inside one, which is what a publisher shows when it has run a request
    often enough, and by `ReconnectTimeout`.
    """


class IDisconnectionError(IDatabaseUnavailable, IRetry):
    """The connection was lost, nothing was committed, and the unit of work may run again."""

    def getOriginalException():
        """The ``sys.exc_info()`` triple of the driver's error, or of
        `DisconnectedConnectionError` for a request made on a doomed connection; None after
        unpickling."""


class IConnectionEvent(Interface):
    """Something happened to the connection to a server."""

    server = Attribute("The server's address, without password.")
    is_news = Attribute(
        "False if the process has said the same of this server before, about another connection, "
        "and not long ago; then the line in the log is one at DEBUG."
    )


class IConnectionLost(IConnectionEvent):
    """A server session ended without being asked to."""

    error = Attribute("The driver's error.")
    state = Attribute(
        "The connection's state when the loss was noticed, most often idle or active."
    )


class IConnectionAttemptFailed(IConnectionEvent):
    """An attempt to connect failed, and there will be another one."""

    attempt = Attribute("The number of the attempt, from 1.")
    seconds = Attribute("The seconds since the first attempt began.")
    pause = Attribute("The seconds until the next attempt.")
    error = Attribute("The error of the attempt.")


class IWaiting(IConnectionEvent):
    """The threads of a process wait for a server that is away: when that begins, after 10 seconds,
    after a minute, and then every five minutes."""

    seconds = Attribute("The seconds since the server was first met away.")
    waiting = Attribute("How many threads wait for it.")
    error = Attribute("The error of the last attempt.")


class IReconnected(IConnectionEvent):
    """There is a session again, after a lost one or after failed attempts."""

    attempts = Attribute("The number of attempts.")
    seconds = Attribute("The seconds from the first attempt to the session.")
    away = Attribute(
        "The seconds since a thread of the process has first met the server away; 0 if none has, "
        "or if another one tells it."
    )


class ICommitLookedUp(IConnectionEvent):
    """The answer to a COMMIT was lost, and the outcome was looked up, or could not be."""

    outcome = Attribute("``committed``, ``aborted`` or ``unknown``.")
    request = Attribute("What was sent, most often COMMIT.")
    evidence = Attribute("What a person needs to find it out by hand, as far as it is known.")
    xid = Attribute("The transaction's id in PostgreSQL, if it is known, or None.")


class ICommittedInPart(IConnectionEvent):
    """One transaction of several databases is committed in some of them, or may be, and not in all;
    `PartlyCommitted` is raised."""

    committed = Attribute("The addresses of the servers where it is committed.")
    not_committed = Attribute("Those where it is not.")
    unknown = Attribute("Those where that could not be found out.")
    error = Attribute("What is raised.")


class IHistoryChanged(IConnectionEvent):
    """The server goes on in another history than that of the connection's last session, as after a
    failover, or without what was acknowledged to the connection."""

    evidence = Attribute("What shows it, in words.")
    is_missing = Attribute(
        "Whether something is missing that was acknowledged to the connection: True or False, if "
        "that is proven, or None."
    )


class IGaveUp(IConnectionEvent):
    """The policy's patience ended."""

    attempts = Attribute("The number of attempts.")
    seconds = Attribute("The seconds from the first attempt to the end of the last.")
    error = Attribute("The error of the last attempt.")
    away = Attribute("As in `IReconnected`.")


class IRunAgain(Interface):
    """A function has failed and will be run again, by `retry_on_disconnect` or by ``run``."""

    function = Attribute("The function's module and name.")
    runs = Attribute("How often the function was run.")
    seconds = Attribute("The seconds since the first run began.")
    pause = Attribute("The seconds until the next run.")
    error = Attribute("What the last run raised.")
    is_news = Attribute(
        "False if the same was said of the function in the same outage, and not long ago; then the "
        "line in the log is one at DEBUG."
    )


class IGaveUpRunning(Interface):
    """A function that `retry_on_disconnect` or ``run`` could have run again is not run again; the
    error is raised."""

    function = Attribute("The function's module and name.")
    runs = Attribute("How often the function was run.")
    seconds = Attribute("The seconds from the beginning of the first run to the end of the last.")
    error = Attribute("What the last run raised.")
    reason = Attribute("Why: the time is up, or it may have committed something.")
    is_news = Attribute("As in `IRunAgain`.")
