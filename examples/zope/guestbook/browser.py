"""The pages, of plain text."""

from Products.Five.browser import BrowserView
from zope.component import getUtility

from zreconnect.interfaces import IZopeDatabaseAdapter


class DatabaseView(BrowserView):
    def __call__(self):
        self.request.response.setHeader("Content-Type", "text/plain")
        # The connection is the thread's, and part of the request's transaction. If it is lost,
        # the publisher calls this method again, on a new one.
        with getUtility(IZopeDatabaseAdapter, "guestbook")().cursor() as cursor:
            return self.text(cursor)


class Guests(DatabaseView):
    def text(self, cursor):
        if self.request.method == "POST":
            name = self.request.form["name"]
            cursor.execute("INSERT INTO guest VALUES (%s)", [name])
            return f"Welcome, {name}\n"
        cursor.execute("SELECT count(*) FROM guest")
        ((number,),) = cursor.fetchall()
        return f"{number} guests\n"


class AllGuests(DatabaseView):
    def text(self, cursor):
        cursor.execute("SELECT name FROM guest ORDER BY name")
        return "".join(f"{name}\n" for (name,) in cursor.fetchall())
