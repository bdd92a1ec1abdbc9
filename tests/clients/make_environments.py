"""Installs the clients that are driven, each version as docs/clients.md was made with.

    python tests/clients/make_environments.py [NAME...]

Knows:        which packages make an environment.
Ignorant of:  what is done with them.
"""

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ENVIRONMENTS = Path(__file__).parent / ".environments"

# LiteLLM wants another openai than the others have.
PYTHON = {
    "llm": ["llm==0.36"],
    "langchain": ["langchain-openai==1.7.3"],
    "pydantic_ai": ["pydantic-ai-slim[openai]==2.68.0"],
    "litellm": ["litellm==1.106.2", "mcp"],  # which it imports where tools are given
}
NODE = {
    "node": {
        "openai": "6.49.0",
        "@anthropic-ai/sdk": "1.12.0",
        "ai": "6.0.326",
        "@ai-sdk/openai-compatible": "2.0.87",
        "zod": "4.6.7",
    },
    "agents": {
        "@anthropic-ai/claude-code": "2.1.197",
        "@continuedev/cli": "1.5.47",
        "@openai/codex": "0.169.0",
        "opencode-ai": "1.18.33",
    },
}


def main() -> None:
    for name in sys.argv[1:] or [*PYTHON, *NODE]:
        folder = ENVIRONMENTS / name
        if name in PYTHON:
            venv.create(folder, with_pip=True)
            pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
            subprocess.run([*pip, *PYTHON[name]], check=True)
        else:
            npm = shutil.which("npm")
            assert npm is not None, "npm is not installed"
            folder.mkdir(parents=True, exist_ok=True)
            package = {"private": True, "dependencies": NODE[name]}
            (folder / "package.json").write_text(json.dumps(package))
            subprocess.run([npm, "install", "--no-fund", "--no-audit"], cwd=folder, check=True)


if __name__ == "__main__":
    main()
