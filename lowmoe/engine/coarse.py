"""How an expert is read that is missed, where that is not how others are: --miss-planes.

Knows:        which planes are read first.
Ignorant of:  when, and where to.
"""

from lowmoe.engine.runtime import Loading
from lowmoe.errors import UsageError
from lowmoe.experts.source import CoarseFirst, FolderExperts
from lowmoe.experts.traced import traced


def coarse_first(loading: Loading, part_bytes: tuple[int, ...]) -> CoarseFirst | None:
    """None where it was not asked for.  part_bytes: of all parts that an expert is computed at.

    Raises UsageError for as many planes as all.
    """
    n_first, timeline = loading.options.miss_planes, loading.options.timeline
    if n_first is None:
        return None
    if n_first >= len(part_bytes):
        raise UsageError(
            f"miss_planes is {n_first}, but experts are computed at {len(part_bytes)}. Give fewer, "
            "or more bits."
        )
    names = loading.opened.recipe.part_names[: len(part_bytes)]
    cuts = slice(0, n_first), slice(n_first, len(part_bytes))
    first, rest = (
        traced(FolderExperts(loading.opened, names[cut], part_bytes[cut]), timeline) for cut in cuts
    )
    return CoarseFirst(first, rest)
