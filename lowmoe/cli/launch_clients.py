"""How programs of others are pointed at a server of this one.

Knows:        each program's environment variables, configuration files and command.
Ignorant of:  whether it is installed, who starts it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One that answers.  url: without a path; key: None where it wants none."""

    url: str
    model: str
    n_context: int
    key: str | None

    @property
    def v1(self) -> str:
        """Where OpenAI's paths begin."""
        return f"{self.url}/v1"

    @property
    def token(self) -> str:
        """Something, as most programs send a key or do not start."""
        return self.key or "lowmoe"


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What to do for one program.

    command: None for a library, or a program that reads its own settings; files: to be written
    before, into a folder of lowmoe's own; snippet: to be put by hand where `place` says; install:
    how it is got.
    """

    title: str
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[Path, str] = field(default_factory=dict)
    command: tuple[str, ...] | None = None
    snippet: str | None = None
    place: str | None = None
    install: str


# Else LiteLLM, which aider asks by, fetches what clouds' models cost.
_NO_PRICES = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}

# server, a folder for files -> what to do
Client = Callable[[Server, Path], Launch]


def _openai(title: str, install: str, **others: str) -> Client:
    """A library that reads these variables; a program of one's own names the model.

    OPENAI_API_BASE is the older name of the address, which some read alone.
    """

    def launch(server: Server, folder: Path) -> Launch:
        addresses = dict.fromkeys(("OPENAI_BASE_URL", "OPENAI_API_BASE"), server.v1)
        return Launch(
            title=title,
            environment={**addresses, "OPENAI_API_KEY": server.token, **others},
            install=install,
        )

    return launch


def _anthropic(title: str, install: str) -> Client:
    def launch(server: Server, folder: Path) -> Launch:
        return Launch(
            title=title,
            environment={"ANTHROPIC_BASE_URL": server.url, "ANTHROPIC_API_KEY": server.token},
            install=install,
        )

    return launch


def _claude_code(server: Server, folder: Path) -> Launch:
    roles = ("ANTHROPIC_MODEL", *(f"ANTHROPIC_DEFAULT_{n}_MODEL" for n in _CLAUDES))
    return Launch(
        title="Anthropic's Claude Code",
        environment={
            "ANTHROPIC_BASE_URL": server.url,
            "ANTHROPIC_AUTH_TOKEN": server.token,
            **dict.fromkeys(roles, server.model),
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "CLAUDE_CODE_DISABLE_EXPERIMENTAL_BETAS": "1",  # fields that only its makers know
            "CLAUDE_CONFIG_DIR": str(folder),  # a login in the usual place would be used instead
        },
        command=("claude",),
        install="npm install -g @anthropic-ai/claude-code",
    )


_CLAUDES = ("OPUS", "SONNET", "HAIKU")


def _codex(server: Server, folder: Path) -> Launch:
    provider = {
        "name": "lowmoe",
        "base_url": server.v1,
        "env_key": "LOWMOE_API_KEY",
        "wire_api": "responses",
    }
    lines = [
        f"model = {json.dumps(server.model)}",
        'model_provider = "lowmoe"',
        f"model_context_window = {server.n_context}",
        'web_search = "disabled"',  # which OpenAI's servers do
        "",
        "[features]",
        "multi_agent = false",  # tools in a form that no other server knows
        "",
        "[model_providers.lowmoe]",
        *(f"{key} = {json.dumps(value)}" for key, value in provider.items()),
    ]
    return Launch(
        title="OpenAI's Codex",
        environment={"CODEX_HOME": str(folder), "LOWMOE_API_KEY": server.token},
        files={folder / "config.toml": "\n".join(lines) + "\n"},
        command=("codex",),
        install="npm install -g @openai/codex",
    )


def _opencode(server: Server, folder: Path) -> Launch:
    limit = {"context": server.n_context, "output": server.n_context // 2}
    config = {
        "$schema": "https://opencode.ai/config.json",
        "provider": {
            "lowmoe": {
                "npm": "@ai-sdk/openai-compatible",
                "name": "lowmoe",
                "options": {"baseURL": server.v1, "apiKey": server.token},
                "models": {server.model: {"name": server.model, "limit": limit}},
            }
        },
        "model": f"lowmoe/{server.model}",
        "small_model": f"lowmoe/{server.model}",
        "share": "disabled",
        "autoupdate": False,
    }
    path = folder / "opencode.json"
    return Launch(
        title="opencode",
        environment={"OPENCODE_CONFIG": str(path)},
        files={path: _written(config)},
        command=("opencode",),
        install="npm install -g opencode-ai",
    )


def _llm(server: Server, folder: Path) -> Launch:
    # JSON is YAML.
    models = [
        {
            "model_id": server.model,
            "model_name": server.model,
            "api_base": server.v1,
            "supports_schema": True,
            "supports_tools": True,
        }
    ]
    return Launch(
        title="llm",
        environment={
            "LLM_USER_PATH": str(folder),
            "LLM_MODEL": server.model,
            "OPENAI_API_KEY": server.token,
        },
        files={folder / "extra-openai-models.yaml": _written(models)},
        command=("llm", "chat"),
        install="pip install llm",
    )


def _aider(server: Server, folder: Path) -> Launch:
    return Launch(
        title="aider",
        environment={
            "OPENAI_API_BASE": server.v1,
            "OPENAI_API_KEY": server.token,
            "AIDER_MODEL": f"openai/{server.model}",
            "AIDER_ANALYTICS": "false",
            **_NO_PRICES,
        },
        command=("aider",),
        install="pip install aider-chat",
    )


def _continue(server: Server, folder: Path) -> Launch:
    model = {
        "name": server.model,
        "provider": "openai",
        "model": server.model,
        "apiBase": server.v1,
        "apiKey": server.token,
        "defaultCompletionOptions": {"contextLength": server.n_context},
    }
    config = {"name": "lowmoe", "version": "1.0.0", "schema": "v1", "models": [model]}
    path = folder / "config.yaml"
    return Launch(
        title="Continue",
        files={path: _written(config)},
        command=("cn", "--config", str(path)),
        snippet=_written(config),
        place="~/.continue/config.yaml, for the extensions of editors",
        install="npm install -g @continuedev/cli",
    )


def _open_webui(server: Server, folder: Path) -> Launch:
    return Launch(
        title="Open WebUI",
        environment={
            "OPENAI_API_BASE_URL": server.v1,
            "OPENAI_API_KEY": server.token,
            "DATA_DIR": str(folder),
        },
        command=("open-webui", "serve", "--port", "3000"),
        install="pip install open-webui",
    )


def _zed(server: Server, folder: Path) -> Launch:
    model = {
        "name": server.model,
        "display_name": server.model,
        "max_tokens": server.n_context,
        "capabilities": {"tools": True, "images": False, "parallel_tool_calls": False},
    }
    settings = {
        "language_models": {
            "openai_compatible": {"lowmoe": {"api_url": server.v1, "available_models": [model]}}
        },
        "agent": {"default_model": {"provider": "lowmoe", "model": server.model}},
    }
    return Launch(
        title="Zed",
        environment={"LOWMOE_API_KEY": server.token},
        snippet=_written(settings),
        place="~/.config/zed/settings.json",
        install="https://zed.dev/download",
    )


def _ai_sdk(server: Server, folder: Path) -> Launch:
    options = {
        "name": "lowmoe",
        "baseURL": server.v1,
        "apiKey": server.token,
        "supportsStructuredOutputs": True,
    }
    lines = [
        'import { createOpenAICompatible } from "@ai-sdk/openai-compatible";',
        f"export const lowmoe = createOpenAICompatible({json.dumps(options)});",
        f"export const model = lowmoe({json.dumps(server.model)});",
    ]
    return Launch(
        title="Vercel's AI SDK",
        snippet="\n".join(lines) + "\n",
        place="a module of yours",
        install="npm install ai @ai-sdk/openai-compatible",
    )


def _written(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


CLIENTS: Mapping[str, Client] = {
    "ai-sdk": _ai_sdk,
    "aider": _aider,
    "anthropic-node": _anthropic("Anthropic's library for Node", "npm install @anthropic-ai/sdk"),
    "anthropic-python": _anthropic("Anthropic's library for Python", "pip install anthropic"),
    "claude-code": _claude_code,
    "codex": _codex,
    "continue": _continue,
    "langchain": _openai("LangChain", "pip install langchain-openai"),
    "litellm": _openai(
        "LiteLLM",
        "pip install litellm",
        **_NO_PRICES,
    ),
    "llm": _llm,
    "open-webui": _open_webui,
    "openai-node": _openai("OpenAI's library for Node", "npm install openai"),
    "openai-python": _openai("OpenAI's library for Python", "pip install openai"),
    "opencode": _opencode,
    "pydantic-ai": _openai("Pydantic AI", "pip install 'pydantic-ai-slim[openai]'"),
    "zed": _zed,
}
