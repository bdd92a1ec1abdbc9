"""What a client may call the model that is served.

Knows:        the names that stand for it.
Ignorant of:  how names are looked up when a model is loaded, dialects.
"""

from typing import Annotated, TypeAlias

from pydantic import Field

from lowmoe.server.asking import ModelCard
from lowmoe.server.errors import FieldError

ANY = "lowmoe"  # whichever is served, for configurations that outlive a model

ModelName: TypeAlias = Annotated[str, Field(max_length=512)] | None


def require_served(asked: str | None, card: ModelCard) -> None:
    """Return if this names the served model: by its name, the last part of it, ANY, or not at all.

    Raises FieldError, 404, for another: a client that believes to talk with another model must
    hear of it.
    """
    names = {card.name, card.name.rpartition("/")[2], ANY, ""}
    if asked is not None and asked.lower() not in {name.lower() for name in names}:
        raise FieldError(
            "model",
            f"{asked[:100]} is not served here, {card.name} is. Name that, or leave it out.",
            status=404,
        )
