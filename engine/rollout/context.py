"""How long a text can be for a model to read every token as it was trained to."""

from typing import Any

from gearshift.engine.attention.packed import moving_rope, rope_entries

# Their first positions belong to padding: transformers counts from padding_idx + 1.
_COUNTED_FROM_PADDING = {
    "camembert", "data2vec-text", "ibert", "lilt", "longformer", "luke", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip


def positions(hf_config: Any) -> int | None:
    """Tokens of the longest text that a model can read; None where nothing bounds them.

    YaRN stretches what the configuration says. Where the rotary frequencies change with a batch's
    longest row (dynamic, longrope), texts end before: a row's log-probs must not depend on others,
    nor the cached keys of its beginning on how long it gets.
    """
    text = hf_config.get_text_config()
    count = getattr(text, "max_position_embeddings", None)
    if count is None or count < 1:  # XLNet says -1
        return None
    for entry in rope_entries(text):
        before = entry.get("original_max_position_embeddings") or count
        if entry.get("rope_type") == "longrope":
            count = min(count, before)
        elif entry.get("rope_type") == "yarn":
            count = max(count, int(before * (entry.get("factor") or 1)))
    offset = text.pad_token_id + 1 if text.model_type in _COUNTED_FROM_PADDING else 0
    return count - offset


def moves(hf_config: Any) -> bool:
    """Whether longer texts than `positions` would change a model's rotary frequencies."""
    return moving_rope(hf_config.get_text_config()) is not None
