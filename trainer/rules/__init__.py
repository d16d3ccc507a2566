"""What options mean together: which exclude each other, which have no effect.

Works on leaves whose types and ranges are already right. Two values that somebody set on
purpose and that contradict each other are an error; a default that contradicts one yields.
"""

from __future__ import annotations

from trainer.rules.concepts import (
    give_identifiers,
    name_identifier_in_prompt,
    refuse_identifiers_in_class,
    require_class,
    warn_of_prompts_without_identifier,
)
from trainer.rules.draft import Draft
from trainer.rules.exclusions import EXCLUSIONS, leave_steps_to_denoiser, save_as_trained
from trainer.rules.idle import note_idle
from trainer.rules.ordinary import warn_of_ordinary_identifiers
from trainer.rules.pictures import (
    choose_buckets,
    hold_cached_windows,
    leave_captions_to_concepts,
    leave_size_to_priority,
    require_pictures,
    square_one_sided_size,
)
from trainer.rules.rates import fill_rates, one_rate_for_prodigy
from trainer.rules.remarks import warn_of_odd, warn_of_weightless_class

__all__ = ["Draft", "settle"]

# In this order: a rule finds the values that those before it have settled.
_RULES = (
    require_pictures,
    leave_captions_to_concepts,
    give_identifiers,
    name_identifier_in_prompt,
    require_class,
    refuse_identifiers_in_class,
    leave_steps_to_denoiser,
    save_as_trained,
    hold_cached_windows,
    leave_size_to_priority,
    choose_buckets,
    square_one_sided_size,
    one_rate_for_prodigy,
    fill_rates,
    warn_of_odd,
    warn_of_weightless_class,
    warn_of_prompts_without_identifier,
    warn_of_ordinary_identifiers,
    note_idle,
)


def settle(draft: Draft) -> None:
    """Resolves every conflict, fills the learning rates, and notes what is odd or idle."""
    for exclusion in EXCLUSIONS:
        exclusion.apply(draft)
    for rule in _RULES:
        rule(draft)
