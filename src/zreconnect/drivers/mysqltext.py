"""What the text of a statement says of what it may do to a session of MySQL's or MariaDB's.

Only what is known to commit nothing is taken for that: the server has many statements that commit,
some that contain others, and in its next version a few more.
"""

from __future__ import annotations

import re

# Comments may stand before a statement. The server executes one with an exclamation mark.
COMMENT = r"--\s[^\n]*\n|#[^\n]*\n|/\*(?!M?!)(?:(?!\*/).)*\*/"
BLANK = rf"(?:\s|{COMMENT})*"
GAP = rf"(?:\s|{COMMENT})+"
EXECUTABLE = r"/\*M?!\d*"
# https://mariadb.com/kb/en/sql-statements/
HARMLESS = re.compile(
    BLANK + r"\(*" + BLANK + r"(?:SET\s+STATEMENT\b(?:(?!\bFOR\b).)*\bFOR\b" + BLANK + r")?"
    r"(?:SELECT|INSERT|UPDATE|DELETE|REPLACE|WITH|VALUES|TABLE|SHOW|DESC|DESCRIBE|EXPLAIN|HELP|USE|DO"
    r"|SAVEPOINT|ROLLBACK|RELEASE|PREPARE|DEALLOCATE|KILL|HANDLER|SIGNAL|LOAD\s+(?:DATA|XML)"
    r"|(?:CREATE(?:\s+OR\s+REPLACE)?|DROP)\s+TEMPORARY\s+TABLE"
    r"|SET(?!\b.*\b(?:AUTOCOMMIT|PASSWORD|DEFAULT\s+ROLE|STATEMENT)\b))\b",
    re.IGNORECASE | re.DOTALL,
)
# https://mariadb.com/kb/en/sql-statements-that-cause-an-implicit-commit/
COMMITTING = re.compile(
    rf"(?:\s|{COMMENT}|{EXECUTABLE})*"
    r"(?!(?:CREATE(?:\s+OR\s+REPLACE)?|DROP)\s+TEMPORARY\s+TABLE\b|BEGIN\s+NOT\b)"
    r"(?:ALTER|ANALYZE|BEGIN|CACHE|CHANGE|CHECK|COMMIT|CREATE|DROP|FLUSH|GRANT|INSTALL|LOCK|OPTIMIZE"
    r"|RENAME|REPAIR|RESET|REVOKE|SET\s+(?:PASSWORD|DEFAULT\s+ROLE)|START|STOP|TRUNCATE|UNINSTALL"
    r"|UNLOCK)\b",
    re.IGNORECASE | re.DOTALL,
)
# One that has others, with their semicolons, in it.
ROUTINE = re.compile(
    BLANK + r"CREATE\b(?:(?!\bBEGIN\b).)*\b(?:PROCEDURE|FUNCTION|TRIGGER|EVENT)\b.*\bBEGIN\b.*"
    r"\bEND[\s;]*\Z",
    re.IGNORECASE | re.DOTALL,
)
READING = re.compile(BLANK + r"(?:SELECT|SHOW|DESC|EXPLAIN|HELP|SET)\b", re.IGNORECASE | re.DOTALL)
# Whether it stands in quotes depends on the session's sql_mode.
SETTING_MODE = re.compile(BLANK + r"SET\b.*\bAUTOCOMMIT\b", re.IGNORECASE | re.DOTALL)
# What may choose a database or a character set for the session; and one that says which.
CHOOSING = re.compile(
    rf"(?:\s|{COMMENT}|{EXECUTABLE})*"
    r"(?:USE|SET|CALL|EXECUTE|BEGIN|IF|CASE|LOOP|WHILE|REPEAT|FOR"
    rf"|(?:DROP|CREATE{GAP}OR{GAP}REPLACE){GAP}(?:DATABASE|SCHEMA))\b",
    re.IGNORECASE | re.DOTALL,
)
CHOICE = re.compile(
    BLANK + r"(?:(?P<database>USE\s+(?:`(?:[^`]|``)+`|[\w$]+))"
    r"|(?P<names>SET\s+NAMES\s+'?\w+'?(?:\s+COLLATE\s+'?\w+'?)?))[\s;]*\Z",
    re.IGNORECASE | re.DOTALL,
)
CHOSEN = re.compile(
    r"\b(?:USE|CALL|EXECUTE|DATABASE|SCHEMA|NAMES|CHARSET|CHARACTER|character_set_\w+"
    r"|collation_connection)\b",
    re.IGNORECASE,
)
# Between semicolons, when other quotes are gone.
PART = re.compile(r"(?:`[^`]*`|[^;`])+")
# What begins a transaction, and what ends one, in autocommit mode.
BEGINNING = re.compile(
    rf"(?:\s|{COMMENT}|{EXECUTABLE})*(?:START{GAP}TRANSACTION|BEGIN(?!{GAP}NOT\b))\b",
    re.IGNORECASE | re.DOTALL,
)
ROLLING_BACK = re.compile(
    rf"(?:\s|{COMMENT}|{EXECUTABLE})*ROLLBACK\b(?!.*\bTO\b)", re.IGNORECASE | re.DOTALL
)
CHAINING = re.compile(r"\bAND\s+CHAIN\b", re.IGNORECASE)
SWITCHING = re.compile(
    BLANK + r"SET\s+(?:(?:SESSION|LOCAL)\s+|@@(?:(?:session|local)\s*\.\s*)?)?autocommit"
    r"\s*:?=\s*(?:(1|ON|TRUE)|0|OFF|FALSE)[\s;]*\Z",
    re.IGNORECASE | re.DOTALL,
)
# What can contain a semicolon, or a word, that is no part of a statement.
QUOTED = re.compile(
    r"'[^'\\]*(?:\\.[^'\\]*)*'"
    r'|"[^"\\]*(?:\\.[^"\\]*)*"'
    rf"|`([^`]*)`|{COMMENT}",
    re.DOTALL,
)


def may_commit(text: str, are_several: bool) -> bool:
    """Whether a statement may commit, as far as can be seen from outside.

    are_several: whether the session takes several statements in one string.
    """
    if SETTING_MODE.match(text):
        return True
    parts = [text]
    if are_several:
        parts = [part for part in QUOTED.sub(r" \1", text).split(";") if part.strip()]
    return not all(map(HARMLESS.match, parts or [text]))


def is_committing(text: str, are_several: bool) -> bool:
    """Whether ``text`` is one statement that is known to commit, before and after itself.

    are_several: as for `may_commit`.
    """
    if COMMITTING.match(text) is None:
        return False
    return not are_several or ";" not in text.rstrip("; \t\r\n") or bool(ROUTINE.match(text))


def choices(text: str, are_several: bool) -> dict[str, str] | None:
    """What a statement has chosen for the session, by subject, as statements that choose it again.

    None if that does not show, and the server is to be asked. are_several: as for `may_commit`.
    """
    parts, found = _parts(text, are_several), {}
    for part in parts:
        if CHOOSING.match(part):
            whole = part if len(parts) > 1 else text
            choice = CHOICE.match(whole)
            if choice is not None:
                found[choice.lastgroup or ""] = choice[choice.lastgroup or 0]
            elif CHOSEN.search(whole):
                return None
    return found


def is_inside(text: str, are_several: bool, before: bool) -> bool:
    """Whether a transaction is under way after a statement of autocommit mode.

    Not seen is what a procedure or a compound statement does. are_several: as for `may_commit`.
    before: whether one was under way before the statement.
    """
    for part in _parts(text, are_several):
        if BEGINNING.match(part):
            before = True
        elif COMMITTING.match(part) or ROLLING_BACK.match(part):
            before = CHAINING.search(part) is not None
    return before


def _parts(text: str, are_several: bool) -> list[str]:
    """The statements in a string, without what is quoted if they are several."""
    if not are_several or ";" not in text:
        return [text]
    return [part for part in PART.findall(QUOTED.sub(_identifier, text)) if part.strip()]


def _identifier(quoted: re.Match[str]) -> str:
    return " " if quoted[1] is None else quoted[0]
