"""What is public has a docstring, which is written once."""

import inspect
import pydoc
import re
import unittest
from dataclasses import dataclass
from pathlib import Path

from zope.interface import Attribute, Interface
from zope.interface.verify import verifyClass, verifyObject

import zreconnect
import zreconnect.integrations
import zreconnect.testing
from zreconnect import adapter, datamanager, events, exceptions, interfaces, witness
from zreconnect.connection import Savepoint
from zreconnect.documented import documented_by, implements
from zreconnect.drivers import base, mysql, postgresql, psycopg, psycopg2, sqlite

# What the classes and functions of zreconnect's own names give and take.
MODULES = (adapter, datamanager, events, exceptions, witness)
DRIVERS = (
    base.BaseDriver,
    mysql.MysqlDriver,
    postgresql.PostgresqlDriver,
    psycopg.PsycopgDriver,
    psycopg2.Psycopg2Driver,
    sqlite.SqliteDriver,
)


class ISquare(Interface):
    """A square."""

    side = Attribute("The length of a side, in metres.")

    def area():
        """The area, in square metres."""


class IShape(ISquare):
    """A square that can be named."""

    name = Attribute("What people call it.")
    colour = Attribute("What it is\n    painted with.")

    def draw(width):
        """Draw it.

        width: of the lines,
            in metres.
        """

    def unit():
        """A square of one metre."""

    def corners():
        """How many corners it has."""

    def silent(): ...


class Constant:
    """A descriptor."""

    def __get__(self, instance, owner=None):
        return self if instance is None else "red"


@implements(IShape)
class Shape:
    __slots__ = ("_length", "name")

    colour = Constant()
    material = Constant()

    @property
    def side(self):
        return 1

    length = side

    def area(self):
        """Of its own."""

    def draw(self, width):
        return width

    @classmethod
    def unit(cls):
        return cls()

    @staticmethod
    def corners():
        return 4

    def silent(self):
        return None

    def other(self):
        return None


class DocumentedTests(unittest.TestCase):
    def test_the_class_implements_the_interfaces(self):
        verifyClass(IShape, Shape)
        shape = Shape()
        shape.name = "square"
        verifyObject(IShape, shape)
        self.assertTrue(ISquare.implementedBy(Shape))

    def test_methods(self):
        self.assertEqual(Shape.draw.__doc__, "Draw it.\n\nwidth: of the lines,\n    in metres.")
        self.assertEqual(str(inspect.signature(Shape.draw)), "(self, width)")

    def test_methods_of_the_class(self):
        self.assertEqual(Shape.unit.__doc__, "A square of one metre.")
        self.assertEqual(Shape.corners.__doc__, "How many corners it has.")
        self.assertEqual(vars(Shape)["unit"].__doc__, Shape.unit.__doc__)

    def test_properties_by_an_inherited_name_of_the_interface(self):
        self.assertEqual(Shape.side.__doc__, "The length of a side, in metres.")
        self.assertEqual(Shape.length.__doc__, Shape.side.__doc__)

    def test_descriptors(self):
        self.assertEqual(Shape.colour.__doc__, "What it is\npainted with.")
        self.assertEqual(Shape.material.__doc__, Constant.__doc__)
        self.assertEqual(Constant.__doc__, "A descriptor.")

    def test_slots(self):
        self.assertEqual(inspect.getdoc(Shape.name), "What people call it.")
        self.assertIsNone(inspect.getdoc(Shape._length))
        self.assertEqual(list(Shape.__slots__), ["_length", "name"])

    def test_slots_that_have_docstrings(self):
        @documented_by(IShape)
        class Named:
            __slots__ = {"length": "In metres.", "name": None}

        self.assertEqual(inspect.getdoc(Named.length), "In metres.")
        self.assertEqual(inspect.getdoc(Named.name), "What people call it.")

    def test_a_docstring_of_its_own_stays(self):
        self.assertEqual(Shape.area.__doc__, "Of its own.")

    def test_what_the_interface_does_not_describe_stays_without(self):
        self.assertIsNone(Shape.other.__doc__)
        self.assertIsNone(Shape.silent.__doc__)

    def test_a_class_without_a_docstring_gets_the_interfaces(self):
        self.assertEqual(Shape.__doc__, "A square that can be named.")

        @implements(ISquare)
        class Square:
            """A square of paper."""

        self.assertEqual(Square.__doc__, "A square of paper.")

    def test_what_overrides_has_the_docstring_too(self):
        @documented_by(ISquare)
        class Bigger(Shape):
            def area(self):
                return 2

            def draw(self, width):
                return None

        self.assertEqual(Bigger.area.__doc__, "The area, in square metres.")
        # Of a name that this interface does not have.
        self.assertIsNone(Bigger.draw.__doc__)
        self.assertEqual(Shape.area.__doc__, "Of its own.")

    def test_a_base_class_does_not_implement_what_documents_it(self):
        @documented_by(ISquare)
        class Part:
            def area(self):
                return 1

        self.assertEqual(Part.area.__doc__, "The area, in square metres.")
        self.assertIsNone(Part.__doc__)
        self.assertFalse(ISquare.implementedBy(Part))

    def test_the_first_interface_that_describes_it(self):
        class ITile(Interface):
            def silent():
                """Whether it does not creak."""

            def draw(width):
                """Another one."""

        @implements(IShape, ITile)
        class Tile:
            def silent(self):
                return True

            def draw(self, width):
                return None

        self.assertEqual(Tile.silent.__doc__, "Whether it does not creak.")
        self.assertEqual(Tile.draw.__doc__, Shape.draw.__doc__)

    def test_fields_of_a_dataclass(self):
        @implements(ISquare)
        @dataclass
        class Square:
            """A square."""

            side: float = 1.0

            def area(self):
                return self.side**2

        verifyObject(ISquare, Square())
        self.assertEqual(Square.area.__doc__, "The area, in square metres.")


class PublicNamesTests(unittest.TestCase):
    def test_have_docstrings(self):
        for name in zreconnect.__all__:
            with self.subTest(name):
                value = getattr(zreconnect, name)
                self.assertEqual(list(undocumented(name, value)), [])

    def test_of_what_they_work_with_have_docstrings(self):
        for module in MODULES:
            for name, value in public(vars(module)):
                if getattr(value, "__module__", None) == module.__name__:
                    with self.subTest(f"{module.__name__}.{name}"):
                        self.assertEqual(list(undocumented(name, value)), [])
        self.assertEqual(list(undocumented("Savepoint", Savepoint)), [])

    def test_of_drivers_that_the_interface_has_have_docstrings(self):
        names = set(interfaces.IPipeliningDriver.names(all=True))
        for driver in DRIVERS:
            for name, value in vars(driver).items():
                if name in names and hasattr(type(value), "__get__"):
                    with self.subTest(f"{driver.__name__}.{name}"):
                        self.assertTrue(has_docstring(value))

    def test_of_interfaces_have_docstrings(self):
        for name, interface in public(vars(interfaces)):
            if getattr(interface, "__module__", None) == interfaces.__name__ and not isinstance(
                interface, type
            ):
                with self.subTest(name):
                    self.assertTrue(interface.__doc__)
                    for each, element in interface.namesAndDescriptions():
                        self.assertTrue(element.__doc__, each)

    def test_help_shows_what_the_interface_says(self):
        for cls, interface, names in [
            (
                zreconnect.ReconnectingConnection,
                interfaces.IReconnectingConnection,
                "commit run transaction state autocommit isolation_level readonly cursor_factory",
            ),
            (
                zreconnect.ReconnectingCursor,
                interfaces.IReconnectingCursor,
                "execute fetchmany arraysize itersize connection name",
            ),
            (zreconnect.ReconnectingDatabaseAdapter, interfaces.IZopeDatabaseAdapter, "__call__"),
            (zreconnect.ZopelessTransactionManager, interfaces.IZopelessTransactionManager, "run"),
        ]:
            text = squeezed(pydoc.plain(pydoc.render_doc(cls)))
            for name in names.split():
                with self.subTest(f"{cls.__name__}.{name}"):
                    self.assertIn(squeezed(interface[name].__doc__), text)


class ReferenceTests(unittest.TestCase):
    """docs/reference has every public name: in its place, or where a module's rest is shown."""

    def setUp(self):
        directory = Path(__file__).resolve().parents[3] / "docs/reference"
        text = "".join(path.read_text(encoding="utf-8") for path in directory.glob("*.rst"))
        directives = r"^\.\. (?:auto\w+|interface|py:\w+):: ([\w.]+)$"
        self.shown = re.findall(directives, text, re.MULTILINE)
        self.rests = re.findall(r"^\.\. others:: ([\w.]+)$", text, re.MULTILINE)

    def test_has_the_rest_of_each_module(self):
        modules = [zreconnect, interfaces, zreconnect.integrations, zreconnect.testing]
        self.assertEqual(sorted(self.rests), sorted(module.__name__ for module in modules))

    def test_has_what_there_is_each_once(self):
        self.assertEqual(len(self.shown), len(set(self.shown)))
        for name in self.shown:
            if name.startswith(f"{interfaces.__name__}."):
                self.assertTrue(hasattr(interfaces, name.rpartition(".")[2]), name)


def undocumented(name, value):
    """What has no docstring of a class or function, and of the public parts of a class."""
    if inspect.isroutine(value) and not has_docstring(value):
        yield name
    if not isinstance(value, type):
        return
    # A dataclass without one has its signature there.
    if value.__doc__ is None or value.__doc__.startswith(f"{value.__name__}("):
        yield name
    ours = [cls for cls in value.__mro__ if cls.__module__.partition(".")[0] == "zreconnect"]
    for part in {part: None for cls in ours for part, _ in public(vars(cls))}:
        found = inspect.getattr_static(value, part)
        if hasattr(type(found), "__get__") and not has_docstring(getattr(value, part)):
            yield f"{name}.{part}"


def has_docstring(value):
    """Whether it has one itself; other objects than functions show that of their class."""
    docstring = inspect.getdoc(value)
    return bool(docstring) and docstring != inspect.getdoc(type(value))


def public(names):
    return [(name, value) for name, value in names.items() if not name.startswith("_")]


def squeezed(text):
    # help() marks the lines of a class.
    return " ".join(text.replace("|", " ").split())
