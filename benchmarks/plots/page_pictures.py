"""What does the server's page look like?   docs/pictures/page_*.png, of the demo model at work.

Needs the extra `browser`, Chromium and Pillow:  python benchmarks/plots/page_pictures.py
"""

import io
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

PICTURES = Path(__file__).parents[2] / "docs/pictures"
SERVE = [sys.executable, "-c", "from lowmoe.cli.app import main; main()", "serve", "--port", "0"]
SERVE += ["--threads", "1"]  # a browser that draws without a GPU needs the others

QUESTION = "Tell me a story about a clockmaker and a fox."
SIZES = {"desktop": (1280, 820, 1.25), "phone": (360, 740, 2)}
WARM = 3  # answers before the picture, so that every expert is in memory


def picture(browser: Browser, address: str, name: str, scheme: str) -> None:
    """In the middle of an answer."""
    width, height, scale = SIZES[name]
    context = browser.new_context(
        viewport={"width": width, "height": height}, device_scale_factor=scale, color_scheme=scheme
    )
    page = context.new_page()
    page.goto(address)
    for _ in range(WARM):
        page.get_by_label("New conversation").click(force=True)
        page.get_by_label("Your message").fill(QUESTION)
        page.keyboard.press("Enter")
        page.locator(".assistant footer").wait_for()
    page.get_by_label("New conversation").click()
    page.get_by_label("Your message").fill(QUESTION)
    page.keyboard.press("Enter")
    page.locator(".assistant .block").nth(2).wait_for()
    page.mouse.move(0, height)
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    shot.save(PICTURES / f"page_{name}_{scheme}.png", optimize=True)
    context.close()


def main() -> None:
    with subprocess.Popen(SERVE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        words = server.stdout.readline().split()
        address = next(word for word in words if word.startswith("http://")).rstrip(":,")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            picture(browser, address, "desktop", "dark")
            picture(browser, address, "phone", "light")
        server.send_signal(signal.SIGINT)


if __name__ == "__main__":
    main()
