"""OpenAI's own client, talking with this server.

Knows:        how it is pointed at a server that stands in a thread.
Ignorant of:  what is asked.
"""

import contextlib
from collections.abc import Iterator

import openai

from lowmoe.server.asking import Service
from tests.server.serving import serving


@contextlib.contextmanager
def openai_client(service: Service) -> Iterator[openai.OpenAI]:
    """A client that tries once, and whatever comes back must have the shape of its own types."""
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
