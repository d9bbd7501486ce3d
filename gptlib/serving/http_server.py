"""The HTTP server around the app: waitress, its socket, and the connections of its clients.

One thread reads and writes all connections. A request gets a thread of its own when it is complete.
Output never blocks that thread: a client that reads slowly leaves its text in a buffer (on disk
beyond a megabyte), and the text comes no faster than the model writes it.
"""

import json
import socket
import time

from gptlib.common import UserError
from gptlib.serving.api import ApiError

SPARE_THREADS = 8  # beside those that wait for text: they refuse requests and answer /health
REQUEST_SECONDS = 60  # in which a request has to arrive whole
STALL_SECONDS = 120  # after which a client that reads nothing of its answer is given up
IDLE_SECONDS = 60  # after which a connection without a request is closed
OUTPUT_BYTES = 2**60  # that may wait for a client: no thread waits until it has read them
CHECK_SECONDS = 1  # between two looks at all connections


def listen(host, port):
    """A listening socket. Raises UserError if the address is taken or not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), backlog=1024, family=family)
    except OSError as e:
        hint = " (macOS has AirPlay Receiver on port 5000)" if port == 5000 else ""
        raise UserError(f"cannot listen on {host} port {port} ({e.strerror}): "
                        f"choose others with HOST and PORT{hint}") from e


def make_channel_class():
    """A waitress channel with JSON errors, which gives up clients that make no progress."""
    from waitress.channel import HTTPChannel
    from waitress.task import ErrorTask

    class JsonErrorTask(ErrorTask):
        """waitress's own errors (body too large, not HTTP) as JSON, like those of the app."""

        def execute(self):
            error = self.request.error
            answer = ApiError(error.code, f"{error.reason}: {error.body}").body()
            body = json.dumps(answer).encode()
            self.status = f"{error.code} {error.reason}"
            self.content_length = len(body)
            self.response_headers.append(("Content-Type", "application/json"))
            self.set_close_on_finish()
            self.write(body)

    class Channel(HTTPChannel):
        error_task_class = JsonErrorTask
        request_began = None  # when the first byte of an unfinished request came
        last_sent = None  # when a byte of the waiting output was sent last

        def received(self, data):
            result = super().received(data)
            if self.request is None:
                self.request_began = None
            elif self.request_began is None:
                self.request_began = time.monotonic()
            return result

        def send(self, data, do_close=True):
            n_sent = super().send(data, do_close)
            if n_sent:
                self.last_sent = time.monotonic()
            return n_sent

        def close_if_stuck(self, now):
            """Close the connection of a client that neither sends nor reads what it has to."""
            if not self.total_outbufs_len or self.last_sent is None:
                self.last_sent = now
            is_late = self.request_began and now - self.request_began > REQUEST_SECONDS
            if is_late or now - self.last_sent > STALL_SECONDS:
                self.handle_close()  # at once: will_close waits until the client reads

    return Channel


def make_dispatcher(max_threads):
    """A waitress dispatcher that starts a thread only if all others are busy."""
    from waitress.task import ThreadedTaskDispatcher

    class GrowingDispatcher(ThreadedTaskDispatcher):

        def add_task(self, task):
            n_idle = len(self.threads) - self.stop_count - self.active_count
            if len(self.queue) >= n_idle and len(self.threads) < max_threads:
                self.set_thread_count(len(self.threads) + 1)
            super().add_task(task)

    dispatcher = GrowingDispatcher()
    dispatcher.queue_logger.setLevel("ERROR")  # it would warn of a queue for each new thread
    dispatcher.set_thread_count(SPARE_THREADS)
    return dispatcher


def create_server(app, host, port, capacity, max_body_size):
    """A waitress server around the app, already listening, for `capacity` requests at a time."""
    import waitress
    server = waitress.create_server(
        app, sockets=[listen(host, port)],
        _dispatcher=make_dispatcher(capacity + SPARE_THREADS),
        channel_request_lookahead=1,  # read on while a request runs, to notice who disconnects
        max_request_body_size=max_body_size + 1,
        outbuf_high_watermark=OUTPUT_BYTES,
        clear_untrusted_proxy_headers=False,  # access.py knows which of them to believe
        channel_timeout=IDLE_SECONDS, cleanup_interval=CHECK_SECONDS,
        asyncore_use_poll=True, connection_limit=1000, log_socket_errors=False, ident="")
    server.channel_class = make_channel_class()
    close_idle = server.maintenance

    def maintenance(now):
        close_idle(now)
        for channel in list(server.active_channels.values()):
            channel.close_if_stuck(time.monotonic())

    server.maintenance = maintenance
    return server


def stop_listening(server):
    """Refuse new connections from now on, so that a proxy tries another server at once."""
    from waitress.wasyncore import dispatcher
    server.trigger.pull_trigger(lambda: dispatcher.close(server))


def wait_until_sent(server, seconds):
    """Wait at most this long for answers that are written but not yet sent."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        channels = list(server.active_channels.values())
        if not any(c.requests or c.total_outbufs_len for c in channels):
            return
        time.sleep(0.02)


def disconnect_check(environ):
    """A function that returns whether the client of this WSGI request has hung up.

    It always returns False if the WSGI server gives no way to know.
    """
    if "waitress.client_disconnected" in environ:
        return environ["waitress.client_disconnected"]
    connection = environ.get("gunicorn.socket")
    if connection is None:
        return lambda: False

    def is_closed():
        try:
            # a closed connection reads as b""; peeking leaves the data of an open one in place
            return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except (BlockingIOError, ValueError):  # no data yet, or TLS, which cannot peek
            return False
        except OSError:
            return True

    return is_closed
