"""Serve a trained net over HTTP: an image in, its five best classes out.

    scalesnn export RUN -o net.pt2
    python examples/serve.py net.pt2 --port 8000
    curl --data-binary @dog.jpg http://127.0.0.1:8000

The net is a ``torch.export`` program: its Python code is not needed, only scalesnn's fused ops.
"""

import argparse
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from scalesnn.base import UserError
from scalesnn.data.augment import Recipe
from scalesnn.data.headers import BadImageError, decode_rgb
from scalesnn.data.torchvision_loader import evaluation_transform
from scalesnn.exchange.exported import read_program

MOST_BYTES = 32 << 20  # of one image


class Handler(BaseHTTPRequestHandler):
    """Answers POST with the classes of the image in the request's body."""

    def do_POST(self) -> None:
        """Decode, run, answer."""
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MOST_BYTES:
            self.answer(411, {"error": f"Content-Length: at most {MOST_BYTES} bytes, please"})
            return
        try:
            image = evaluation_transform(decode_rgb(self.rfile.read(int(length))), self.server.recipe)
        except BadImageError as error:
            self.answer(400, {"error": str(error)})
            return
        with torch.inference_mode():
            shares = self.server.net(image[None])[0].softmax(0)
        best = shares.topk(min(5, len(shares)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        self.answer(200, {"classes": [[self.server.classes[k], share] for k, share in pairs]})

    def answer(self, status: int, content: dict) -> None:
        """Send JSON."""
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> int:
    """Serve until Ctrl-C; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("program", help="what scalesnn export RUN -o net.pt2 wrote")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (8000)")
    args = parser.parse_args()
    try:
        net, about = read_program(args.program)
    except UserError as error:
        print(f"serve.py: {error}", file=sys.stderr)
        return 2
    server = ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    server.net, server.classes = net, about["classes"]
    server.recipe = Recipe(
        val_resize_size=about["resize"], val_crop_size=about["crop"], interpolation=about["interpolation"]
    )
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    raise SystemExit(main())
