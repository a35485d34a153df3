"""Docstrings are written once, in the interfaces."""

import inspect
import unittest
from dataclasses import dataclass

from zope.interface import Attribute, Interface
from zope.interface.verify import verifyClass, verifyObject

from zreconnect.documented import documented_by, implements


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
