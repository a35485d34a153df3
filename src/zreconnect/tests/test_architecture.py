"""The architecture: who imports whom, who uses whose names, and how long modules and classes are.

Everything is read from the source, nothing is imported.
"""

import ast
import functools
import graphlib
import unittest
from pathlib import Path

import zreconnect

PACKAGE = Path(zreconnect.__file__).parent
# From bottom to top. A module imports from the lines below its own only. A package stands for its
# modules, which may import each other, but for those that have a place of their own.
LAYERS = """
threads advice outage
interfaces turn watchdog commits answers history marks
documented
exceptions policy states drivers.base
events witness dsn hosts knocking
ledger engines drivers server options branch
retry session recovery refusals savepoint
link
work lent kept
finding beginning
guard
siblings
proxies settings cursorsettings overrides datamanager
transfers results twophase
cursor
blocks tpc
drivercalls
connection
descriptor
adapter zopeless
zreconnect
testing integrations
cli integrations.pytest
__main__
"""
LEVELS = {
    name: level for level, line in enumerate(LAYERS.strip().splitlines()) for name in line.split()
}
# Names with an underscore of other projects, for which there are no public ones.
FOREIGN_NAMES = {
    ("drivers.psycopg", "_adapters"): "a connection's; taken over by its next session",
    ("drivers.psycopg", "_last_query"): "what a cursor was given to execute",
    ("drivers.psycopg", "_query"): "what a cursor has sent, as bytes",
    ("drivers.psycopg", "_prepared"): "a connection's prepared statements",
    ("drivers.psycopg", "_counts"): "those that it counts before it prepares them",
    ("drivers.psycopg", "_names"): "those that it has prepared",
    ("drivers.psycopg", "_pipeline"): "what says that a connection is in a pipeline",
    ("drivers.pymysql", "_create_ssl_ctx"): "what makes a context, of which it has no other way",
    ("drivers.pymysql", "_read_timeout"): "PyMySQL takes it before connecting only",
    ("drivers.pymysql", "_result"): "the rest of which would be read at its deletion",
    ("drivers.pymysql", "_read_rowdata_packet_unbuffered"): "what reads it, row by row",
    ("drivers.pymysql", "_sock"): "PyMySQL has no fileno()",
    ("integrations.sqlalchemy", "_pre_ping"): "what a pool was told of pre-pings",
    ("integrations.sqlobject", "_connection"): "that of an SQLObject, as its manual has it",
    ("integrations.sqlobject", "_obsolete"): "what says that an SQLObject is destroyed",
    ("integrations.sqlobject", "_SO_createValues"): "what waits for syncUpdate()",
    ("integrations.zsql.connection", "_p_activate"): "what loads a persistent object's state",
    ("integrations.zsql.connection", "_setObject"): "what puts an object into a folder",
    ("testing.conformance", "_exit"): "that of os, documented",
    ("zopeless", "_connection"): "that of an SQLObject class, as its manual has it",
}
LONGEST_CLASS = 400
LONGEST_MODULE = 450
# The modules of the core are those of the package itself. interfaces is the documentation.
NOT_MEASURED = {"interfaces", "zreconnect"}


class Module:
    """One module's source.

    name: below the package; the package's own is its name.
    """

    def __init__(self, path):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        self.name = ".".join(part for part in parts if part != "__init__") or "zreconnect"
        self.package = path.parent
        self.text = path.read_text(encoding="utf-8")

    @functools.cached_property
    def tree(self):
        return ast.parse(self.text)

    def imports(self, inside_functions):
        """The names of the modules of zreconnect that it imports, with lines.

        Imports under TYPE_CHECKING never happen, and those inside functions not while modules are
        loaded; the former are always left out.
        """
        for node in statements(self.tree, inside_functions):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield from named(alias.name, node.lineno)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.name}, line {node.lineno}: a relative import"
                for alias in node.names:
                    submodule = f"{node.module}.{alias.name}"
                    is_submodule = submodule.removeprefix("zreconnect.") in MODULES
                    yield from named(submodule if is_submodule else node.module, node.lineno)


def named(name, line):
    package, _, inside = name.partition(".")
    if package == "zreconnect":
        yield (inside or package), line


def statements(tree, inside_functions):
    """The statements of a tree that are executed when it is, in nested ones as well."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not inside_functions:
            continue
        yield node
        yield from statements(node, inside_functions)


MODULES = {}
for path in sorted(PACKAGE.rglob("*.py")):
    if "tests" not in path.relative_to(PACKAGE).parts:
        found = Module(path)
        MODULES[found.name] = found


def place(name):
    """The name in `LAYERS` under which a module stands."""
    while name not in LEVELS and "." in name:
        name = name.rpartition(".")[0]
    return name


def level(name):
    """How high a module stands; tests are above everything."""
    return LEVELS.get(place(name), len(LEVELS))


class ImportTests(unittest.TestCase):
    def test_all_modules_have_a_layer(self):
        self.assertEqual({name for name in MODULES if place(name) not in LEVELS}, set())
        self.assertEqual(set(LEVELS) - set(MODULES), set())
        self.assertEqual(len(LEVELS), len(LAYERS.split()))

    def test_no_circle(self):
        """At run time: an import inside a function or under TYPE_CHECKING closes none."""
        graph = {
            name: {imported for imported, _ in module.imports(inside_functions=False)}
            for name, module in MODULES.items()
        }
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            self.fail("an import circle: " + " < ".join(error.args[1]))

    def test_imports_lead_down(self):
        """Those inside functions as well."""
        upwards = [
            f"{name}, line {line}: {imported}"
            for name, module in MODULES.items()
            for imported, line in module.imports(inside_functions=True)
            if place(imported) != place(name) and level(imported) >= level(name)
        ]
        self.assertEqual(upwards, [])

    def test_tables_import_interfaces_only(self):
        imported = {name for name, _ in MODULES["states"].imports(inside_functions=True)}
        self.assertEqual(imported, {"interfaces"})


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


def is_own(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def defined_names(tree):
    """What the functions and classes of a module define, its own attributes included."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if is_own(node.value) else set()
        if isinstance(node, ast.ClassDef):
            for statement in node.body:
                names |= assigned_names(statement)
    return names


def assigned_names(statement):
    """What a statement of a class's body assigns, the names in ``__slots__`` included."""
    targets = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    names = {target.id for target in targets if isinstance(target, ast.Name)}
    if "__slots__" in names:
        names |= set(ast.literal_eval(statement.value))
    return names


def uses_of_others(tree):
    """The private names that are used of something else than ``self``, with lines.

    Also those in getattr() and its like.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not is_own(node.value):
            yield node.attr, node.lineno
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "setattr", "delattr", "hasattr")
            and isinstance(node.args[1], ast.Constant)
            and is_private(node.args[1].value)
            and not is_own(node.args[0])
        ):
            yield node.args[1].value, node.lineno


def private_parts(name):
    """What is private of a dotted name, each with what it is a part of, below zreconnect."""
    _, *parts = name.split(".")
    return [".".join(parts[: n + 1]) for n, part in enumerate(parts) if is_private(part)]


class PrivateNameTests(unittest.TestCase):
    """A rule that needs no types: ``x._name`` belongs to the module that defines ``_name``."""

    def test_none_of_another_module_is_used(self):
        used = []
        for name, module in MODULES.items():
            own = defined_names(module.tree)
            for attribute, line in uses_of_others(module.tree):
                if attribute not in own and (name, attribute) not in FOREIGN_NAMES:
                    used.append(f"{name}, line {line}: {attribute}")
        self.assertEqual(used, [])

    def test_none_of_another_module_is_imported(self):
        """A private module is its package's."""
        imported = []
        for name, module in MODULES.items():
            for node in ast.walk(module.tree):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("zreconnect"):
                    imported += [
                        f"{name}, line {node.lineno}: {path}"
                        for alias in node.names
                        for path in private_parts(f"{node.module}.{alias.name}")
                        if path not in MODULES or MODULES[path].package != module.package
                    ]
        self.assertEqual(imported, [])

    def test_the_exceptions_are_needed(self):
        used = {
            (name, attribute)
            for name, module in MODULES.items()
            for attribute, _ in uses_of_others(module.tree)
            if attribute not in defined_names(module.tree)
        }
        self.assertEqual(set(FOREIGN_NAMES) - used, set())


class LengthTests(unittest.TestCase):
    def setUp(self):
        self.core = {
            name: module
            for name, module in MODULES.items()
            if module.package == PACKAGE and name not in NOT_MEASURED
        }

    def test_classes(self):
        long = {
            f"{name}.{node.name}": length
            for name, module in self.core.items()
            for node in ast.walk(module.tree)
            if isinstance(node, ast.ClassDef)
            and (length := node.end_lineno - node.lineno + 1) > LONGEST_CLASS
        }
        self.assertEqual(long, {})

    def test_modules(self):
        long = {
            name: length
            for name, module in self.core.items()
            if (length := len(module.text.splitlines())) > LONGEST_MODULE
        }
        self.assertEqual(long, {})
