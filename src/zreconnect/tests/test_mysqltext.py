"""What the text of a statement says of what it may do to a transaction on MySQL."""

import unittest

from zreconnect.drivers.mysqltext import (
    READING,
    SWITCHING,
    choices,
    is_committing,
    is_inside,
    may_commit,
)

COMMITTING = """
CREATE TEMPORARY SEQUENCE numbers
COMMIT
/* why */ COMMIT /* */ -- SELECT
create index i on t (c)
TRUNCATE item
LOCK TABLES item WRITE
SET PASSWORD = ''
SET DEFAULT ROLE NONE
/*!50001 CREATE TABLE t (c int) */
/*M!100000 COMMIT */
START TRANSACTION;
"""
PERHAPS = """
CALL work()
EXECUTE IMMEDIATE 'COMMIT'
EXECUTE prepared
BEGIN NOT ATOMIC COMMIT; END
IF 1 THEN COMMIT; END IF
SET autocommit = 1
SET LOCAL autocommit = 1
SET @a = 1, @@session.autocommit = 1
SET @@local.`autocommit` = 1
SET @a = 1 /*! , autocommit = 1 */
SET STATEMENT max_statement_time = 1 FOR COMMIT
SET STATEMENT sql_mode = 'FOR SELECT' FOR COMMIT
SET STATEMENT sql_mode = '' FOR COMMIT /* FOR SELECT */
SET /* */ STATEMENT sql_mode = '' FOR COMMIT
/*! SELECT */ COMMIT
XA COMMIT 'a'
SELECTION
-- nothing
INSERT INTO item VALUES ('x'); COMMIT
SET @@session."autocommit" = 1
SET @a = '\\', autocommit = 1, @b = ''
/* why */ SET @a = 'autocommit'
"""
HARMLESS = """
INSERT INTO item SELECT 'COMMIT'
INSERT INTO item VALUES ('a;b'); UPDATE item SET name = "it\\'s; COMMIT" WHERE `a;b` = 1;
SELECT 1
((SELECT 1) UNION (SELECT 2))
( /* a */ SELECT 1)
SET @@session.sql_mode = ''
SET ROLE NONE
SET STATEMENT max_statement_time = 1 FOR SELECT 1
CREATE OR REPLACE TEMPORARY TABLE scratch (number int)
DROP TEMPORARY TABLE scratch
ROLLBACK
LOAD DATA INFILE 'file' INTO TABLE item
WITH one AS (SELECT 1) SELECT * FROM one
"""


class MayCommitTests(unittest.TestCase):
    def lines(self, text):
        for line in text.strip().splitlines():
            with self.subTest(line):
                yield line

    def test_what_commits(self):
        for line in self.lines(COMMITTING):
            self.assertTrue(may_commit(line, are_several=False))
            self.assertTrue(may_commit(line, are_several=True))
            self.assertTrue(is_committing(line, are_several=True))

    def test_what_may_commit(self):
        for line in self.lines(PERHAPS):
            self.assertTrue(may_commit(line, are_several=True))
            self.assertFalse(is_committing(line, are_several=True))

    def test_what_does_not(self):
        for line in self.lines(HARMLESS):
            self.assertFalse(may_commit(line, are_several=False))
            self.assertFalse(is_committing(line, are_several=True))

    def test_several_in_one(self):
        self.assertFalse(may_commit("INSERT INTO item VALUES ('a;'); UPDATE t SET a = ';'", True))
        self.assertTrue(may_commit("INSERT INTO item VALUES ('a;'); COMMIT", True))
        self.assertFalse(is_committing("COMMIT; INSERT INTO item VALUES (1)", are_several=True))
        self.assertTrue(may_commit("", are_several=True))

    def test_a_routine_contains_others(self):
        for text in (
            "CREATE PROCEDURE work() BEGIN INSERT INTO item VALUES (1); COMMIT; END",
            "create or replace definer = me trigger t before insert on item for each row\n"
            "begin set @a = 1; end;\n",
        ):
            for are_several in (False, True):
                self.assertTrue(is_committing(text, are_several))
        text = "CREATE FUNCTION one() RETURNS int RETURN 1; SELECT 1"
        self.assertFalse(is_committing(text, are_several=True))
        self.assertTrue(is_committing(text, are_several=False))

    def test_comments_over_lines(self):
        for before in ("/* a\n COMMIT */", "-- COMMIT\n", "# COMMIT\n", " \n"):
            self.assertFalse(may_commit(f"{before} SELECT 1", are_several=True))
            self.assertTrue(may_commit(f"{before} COMMIT", are_several=True))
            self.assertTrue(is_committing(f"{before} COMMIT", are_several=True))
            self.assertTrue(READING.match(f"{before} SELECT 1"))


class ChoicesTests(unittest.TestCase):
    def test_what_shows(self):
        for text, expected in {
            "USE customer": {"database": "USE customer"},
            "/* why */ use `a b``;c` ; ": {"database": "use `a b``;c`"},
            "SET NAMES latin1": {"names": "SET NAMES latin1"},
            "set names 'latin1' collate 'latin1_bin';": {
                "names": "set names 'latin1' collate 'latin1_bin'"
            },
            "SET @a = 1": {},
            "SELECT 'USE a', seq FROM item USE INDEX (i)": {},
            "CREATE DATABASE customer CHARACTER SET latin1": {},
            "DROP TABLE item": {},
        }.items():
            for are_several in (False, True):
                with self.subTest(text):
                    self.assertEqual(choices(text, are_several), expected)

    def test_what_only_the_server_knows(self):
        for text in (
            'USE "customer"',
            "/*! USE customer */",
            "EXECUTE IMMEDIATE 'USE customer'",
            "SET STATEMENT max_statement_time = 1 FOR USE customer",
            "BEGIN NOT ATOMIC EXECUTE IMMEDIATE 'USE customer'; END",
            "SET @a = 1, NAMES latin1",
            "SET character_set_results = NULL",
            "SET CHARACTER SET latin1",
            "SET CHARSET latin1",
            "SET collation_connection = @saved",
            "DROP DATABASE customer",
            "drop schema customer",
            "DROP /* a\nb */ SCHEMA customer",
            "CREATE OR REPLACE DATABASE customer",
            "CALL enter('customer')",
            "EXECUTE entering",
            "SET STATEMENT max_statement_time = 1 FOR CALL enter()",
        ):
            with self.subTest(text):
                self.assertIsNone(choices(text, are_several=False))

    def test_several_in_one(self):
        for text, expected in {
            "SELECT 1; USE a; USE `b;c`": {"database": "USE `b;c`"},
            "INSERT INTO item VALUES ('; USE a'); SET NAMES latin1;": {"names": "SET NAMES latin1"},
            "USE a; SET CHARSET latin1": None,
            "USE a; CALL enter()": None,
        }.items():
            with self.subTest(text):
                self.assertEqual(choices(text, are_several=True), expected)


class InsideTests(unittest.TestCase):
    def test_what_begins_a_transaction_and_what_ends_it(self):
        for text, before, after in (
            ("SELECT 1", False, False),
            ("SELECT 1", True, True),
            ("START /* own */ TRANSACTION READ ONLY", False, True),
            ("-- own\nbegin work", False, True),
            ("BEGIN", False, True),
            ("BEGIN NOT ATOMIC SELECT 1; END", False, False),
            ("COMMIT", True, False),
            ("rollback work", True, False),
            ("ROLLBACK TO SAVEPOINT a", True, True),
            ("ROLLBACK AND CHAIN", True, True),
            ("COMMIT AND NO CHAIN", True, False),
            ("CREATE TABLE item (number int)", True, False),
            ("CREATE TEMPORARY TABLE item (number int)", True, True),
        ):
            with self.subTest(text):
                self.assertEqual(is_inside(text, are_several=False, before=before), after)

    def test_several_in_one(self):
        for text, before, after in (
            ("SELECT 1; BEGIN; INSERT INTO item VALUES ('; COMMIT')", False, True),
            ("INSERT INTO item VALUES (1); COMMIT;", True, False),
            ("COMMIT; BEGIN", True, True),
        ):
            with self.subTest(text):
                self.assertEqual(is_inside(text, are_several=True, before=before), after)


class SwitchingTests(unittest.TestCase):
    def test_the_mode(self):
        for text, expected in {
            "SET autocommit = 1": True,
            "/* why */ set SESSION Autocommit=ON ;": True,
            "SET @@autocommit := true": True,
            "SET @@local.autocommit = 0": False,
            "SET LOCAL autocommit = OFF": False,
            "SET autocommit = @mode": None,
            "SET @a = 1, autocommit = 1": None,
            "SET GLOBAL autocommit = 1": None,
            "SET autocommit = 10": None,
        }.items():
            with self.subTest(text):
                switch = SWITCHING.match(text)
                self.assertEqual(switch and switch[1] is not None, expected)
