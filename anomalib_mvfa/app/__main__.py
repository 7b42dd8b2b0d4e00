# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Open the page on this machine: ``python -m anomalib_mvfa.app``."""

import os
import secrets
import sys
import tempfile
import webbrowser
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

__all__ = ["main", "serve"]

PASSWORD = "ANOMALIB_MVFA_PASSWORD"  # noqa: S105 - the name of a variable
LOOPBACK = ("127.0.0.1", "::1", "localhost")
# The browser asks no other host for anything, and shows this page in no other.
POLICY = (
    b"default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    b"style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
)
FULL_SIZE = "ViT-L-14-336"
OFF = ("share", "enable_monitoring", "run_history", "ssr_mode", "pwa", "mcp_server")


def with_policy(app: Any) -> Any:
    """Wrap an ASGI application so that its responses carry our policy."""

    async def run(scope: Any, receive: Any, send: Any) -> None:
        async def add(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", POLICY)]
            await send(message)

        await app(scope, receive, add)

    return run


def serve(root: Path, host: str = LOOPBACK[0], port: int | None = None, password: str | None = None) -> tuple[Any, str]:
    """Start the server with its files in an empty folder, and return the page and its address."""
    # Gradio reads its folder and whether it may call home when it is imported.
    os.environ |= {"GRADIO_TEMP_DIR": str(root), "GRADIO_ANALYTICS_ENABLED": "False"}
    import gradio as gr
    from open_clip.pretrained import get_pretrained_cfg
    from starlette.middleware import Middleware

    from .page import Page

    weights = Path.home() / ".cache" / "clip" / Path(get_pretrained_cfg(FULL_SIZE, "openai")["url"]).name
    page = Page(root, [FULL_SIZE, "tiny"] if weights.is_file() else ["tiny"])
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    _, address, _ = page.blocks.queue(default_concurrency_limit=8).launch(
        server_name=host,
        server_port=port,
        auth=None if password is None else lambda _, given: secrets.compare_digest(given.encode(), password.encode()),
        app_kwargs={"middleware": [Middleware(with_policy)]},
        theme=gr.themes.Default(primary_hue="blue", **fonts),
        css_paths=Path(__file__).with_name("page.css"),
        js=Path(__file__).with_name("page.js").read_text(encoding="utf-8"),
        max_file_size="1gb",
        footer_links=[],
        prevent_thread_lock=True,
        quiet=True,
        **dict.fromkeys(OFF, False),
    )
    return page, address


def main(host: str = LOOPBACK[0], port: int | None = None, browser: bool = True) -> None:
    """Serve the page until it is interrupted.

    Args:
        host: Address; any but loopback asks for a password.
        port: By default the first free one from 7860.
        browser: Whether to open a browser.
    """
    password = None if host in LOOPBACK else os.environ.get(PASSWORD) or secrets.token_urlsafe(12)
    with tempfile.TemporaryDirectory(prefix="anomalib-mvfa-", ignore_cleanup_errors=True) as folder:
        try:
            page, address = serve(Path(folder), host, port, password)
        except ImportError as error:
            sys.exit(f'error: the page needs Gradio ({error}): pip install "anomalib-mvfa[app]"')
        except OSError as error:
            sys.exit(f"error: {error}")
        login = "" if password is None else f"\nAny user name, password {password} (set {PASSWORD} to choose it)"
        print(f"The page is at {address}  Not for clinical use. Stop it with Ctrl+C.{login}", flush=True)  # noqa: T201
        if browser and password is None:
            webbrowser.open(address)
        page.blocks.block_thread()


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
