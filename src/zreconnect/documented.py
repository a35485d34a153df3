"""Docstrings of classes that are written once, in the interfaces."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MemberDescriptorType
from typing import Any, TypeVar

from zope.interface import implementer

Class = TypeVar("Class", bound=type)


def implements(*interfaces: Any) -> Callable[[Class], Class]:
    """Declare that a class implements ``interfaces``, as `zope.interface.implementer` does, and
    have it `documented_by` them.

    A class without a docstring gets that of the first interface; a dataclass has one of its own
    unless ``dataclass`` is applied after this. Raises what ``implementer`` raises.
    """
    document = documented_by(*interfaces)

    def decorate(cls: Class) -> Class:
        implementer(*interfaces)(cls)
        if cls.__doc__ is None:
            cls.__doc__ = inspect.cleandoc(interfaces[0].__doc__ or "")
        return document(cls)

    return decorate


def documented_by(*interfaces: Any) -> Callable[[Class], Class]:
    """Give what a class defines the docstrings of ``interfaces``; for a base class that has a part
    of an implementation, too.

    What is defined in the body of the class itself, by a name of an interface, and has no docstring
    of its own gets that of the first interface that has one: functions, properties, class methods,
    other descriptors and slots. Raises AttributeError for a descriptor that takes none.
    """

    def decorate(cls: Class) -> Class:
        of_slots: dict[str, str] = {}
        for name, value in vars(cls).items():
            if not hasattr(type(value), "__get__") or _has_docstring(value):
                continue
            docstring = _docstring(name, interfaces)
            if not docstring:
                continue
            if isinstance(value, MemberDescriptorType):
                of_slots[name] = docstring
                continue
            value.__doc__ = docstring
            if isinstance(value, (classmethod, staticmethod)):
                # The object shows its own, and what is got from the class the function's.
                value.__func__.__doc__ = docstring
        if of_slots:
            _document_slots(cls, of_slots)
        return cls

    return decorate


def _has_docstring(value: Any) -> bool:
    # An object without one shows that of its class.
    return value.__doc__ is not None and value.__doc__ != type(value).__doc__


def _docstring(name: str, interfaces: tuple[Any, ...]) -> str:
    for interface in interfaces:
        element = interface.get(name)
        if element is not None and element.__doc__:
            return inspect.cleandoc(element.__doc__)
    return ""


def _document_slots(cls: Any, docstrings: dict[str, str]) -> None:
    # A dictionary is where help() looks for them.
    slots = cls.__slots__
    before = slots if isinstance(slots, dict) else dict.fromkeys(slots)
    cls.__slots__ = {**before, **docstrings}
