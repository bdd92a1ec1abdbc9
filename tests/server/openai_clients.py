"""OpenAI's own client, talking with this server.

Knows:        how it is pointed at a server that stands in a thread.
Ignorant of:  what is asked.
"""

import contextlib
from collections.abc import Iterator

import openai

from lowmoe.server.asking import Service
from tests.server.serving import serving

HELLO = [{"role": "user", "content": "Hi"}]


@contextlib.contextmanager
def openai_client(service: Service) -> Iterator[openai.OpenAI]:
    """A client that tries once, and refuses what has not the shape of its own types."""
    with (
        serving(service) as url,
        openai.OpenAI(
            base_url=f"{url}/v1",
            api_key="none",
            max_retries=0,
            timeout=10,
            _strict_response_validation=True,
        ) as client,
    ):
        yield client


def lenient(client: openai.OpenAI) -> openai.OpenAI:
    """The same without that, for streams of /v1/completions: their type says that each piece has a
    finish_reason, but OpenAI's own streams hold null until the last.
    """
    return client.copy(_extra_kwargs={"_strict_response_validation": False})
