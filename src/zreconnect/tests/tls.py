"""Certificates, and TLS before a server of PostgreSQL's that has none."""

import contextlib
import select
import shutil
import socket
import ssl
import struct
import subprocess
import tempfile
import threading
import unittest
from pathlib import Path

from zreconnect.testing._ports import LOCALHOST, bind
from zreconnect.tests.base import PATIENCE, REQUIRED, wait_until

# What a client asks first, as PostgreSQL's protocol has it: the length of the packet, and a code.
SSL_REQUEST = struct.pack("!ii", 8, 80877103)
GSSENC_REQUEST = struct.pack("!ii", 8, 80877104)
CHUNK = 65536


def needs_openssl(test_case):
    """Skip the tests if openssl is not installed, unless it must be."""
    is_there = shutil.which("openssl") or REQUIRED
    return unittest.skipUnless(is_there, "openssl is not installed: make services")(test_case)


def make_certificate(test_case, name="IP:127.0.0.1", has_expired=False):
    """The paths of a certificate, which is its own authority, and of its key.

    name: for which host it is, as openssl has it.
    """
    holder = tempfile.TemporaryDirectory()
    test_case.addCleanup(holder.cleanup)
    # The server of root's runs as another user.
    Path(holder.name).chmod(0o755)
    certificate, key = Path(holder.name, "certificate"), Path(holder.name, "key")
    run_openssl(
        *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=zreconnect"),
        *("-addext", f"subjectAltName={name}", "-keyout", key, "-out", certificate),
    )
    if has_expired:
        # Only this program takes a certificate that ends when it begins.
        signed = ("-in", certificate, "-signkey", key, "-days", "0", "-out", certificate)
        run_openssl("x509", *signed)
        check = ("openssl", "x509", "-in", certificate, "-noout", "-checkend", "0")
        wait_until(lambda: subprocess.run(check, capture_output=True, check=False).returncode)
    key.chmod(0o644)
    return certificate, key


def run_openssl(*arguments):
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


class Terminator:
    """Listens on a port of 127.0.0.1, and is to clients what the server behind it is, with TLS.

    way: "tls"; "none", as a server without; "hang up", which closes the connection inside the
    handshake. unencrypted: how often a client has said something else without TLS. It listens until
    the test ends.
    """

    host = LOCALHOST

    def __init__(self, test_case, server, certificate, key):
        self.way = "tls"
        self.unencrypted = 0
        self._server = server
        self.use(certificate, key)
        self._listener = bind()
        self._listener.listen()
        self.port = self._listener.getsockname()[1]
        self._open = set()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        test_case.addCleanup(self._stop)

    def use(self, certificate, key):
        """Take another certificate."""
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)

    def _stop(self):
        # This wakes who waits; closing does not.
        self._listener.shutdown(socket.SHUT_RDWR)
        for server in self._open.copy():
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                client.settimeout(PATIENCE)
                thread = threading.Thread(target=self._serve, args=(client,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, client):
        # Whatever the client does, this is about what the client sees.
        with client, contextlib.suppress(OSError):
            request = client.recv(8, socket.MSG_WAITALL)
            while request == GSSENC_REQUEST:
                client.sendall(b"N")
                request = client.recv(8, socket.MSG_WAITALL)
            if request != SSL_REQUEST or self.way == "none":
                first = request
                if request == SSL_REQUEST:
                    client.sendall(b"N")
                    first = client.recv(CHUNK)
                self.unencrypted += bool(first)
                self._pass_on(client, first)
            elif self.way == "hang up":
                client.sendall(b"S")
                # What the client says first.
                client.recv(CHUNK)
            else:
                client.sendall(b"S")
                with self._context.wrap_socket(client, server_side=True) as encrypted:
                    self._pass_on(encrypted, b"")

    def _pass_on(self, client, first):
        with socket.create_connection((self._server.host, self._server.port)) as server:
            self._open.add(server)
            server.sendall(first)
            while True:
                is_pending = isinstance(client, ssl.SSLSocket) and client.pending()
                ready = [client] if is_pending else select.select([client, server], [], [])[0]
                for each in ready:
                    data = each.recv(CHUNK)
                    if not data:
                        return
                    (server if each is client else client).sendall(data)
