"""A reward server in the standard library: POST {"query", "prompts", "labels"} -> {"rewards"}. It listens on this machine only.

python examples/python/reward_server.py 8000 &
openrl-reason reinforce ... --reward.function http://127.0.0.1:8000/get_reward
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MAX_BYTES = 64 << 20


def rewards_of(data):
    """1 for a response that ends with its label."""
    return [float(query.rstrip(" .\n").endswith(label)) for query, label in zip(data["query"], data["labels"], strict=True)]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        """Answer with rewards, or with 400 and the reason."""
        length = int(self.headers.get("Content-Length", 0))
        if not 0 < length <= MAX_BYTES:
            self.close_connection = True
            self.reply(413, {"error": f"a request has 1 to {MAX_BYTES} bytes"})
            return
        try:
            self.reply(200, {"rewards": rewards_of(json.loads(self.rfile.read(length)))})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            self.reply(400, {"error": repr(error)})

    def reply(self, status, body):
        """Send JSON."""
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        """No line for each request."""


def main(port):
    """Serve until interrupted; port 0 takes any that is free."""
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    print(f"http://127.0.0.1:{server.server_port}/get_reward", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
