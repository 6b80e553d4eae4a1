"""The texts stage: writes the texts and questions that an imported model is run on."""

from __future__ import annotations

from coremill.core.config import ImportedRun
from coremill.core.layout import chat_prompts_file, texts_file
from coremill.core.stage import Figures, StageContext
from coremill.data.corpora import bundled_texts, chat_prompts, own_texts
from coremill.data.lines import write_lines


def run_stage(context: StageContext[ImportedRun]) -> Figures:
    """Run the texts stage of a pipeline: write `texts.jsonl` and `chat_prompts.jsonl` into `context.out`."""
    config = context.config.texts
    texts, prompts = own_texts(config) if config.files else bundled_texts(config), chat_prompts()
    write_lines(texts_file(context.out), texts)
    write_lines(chat_prompts_file(context.out), prompts)
    return {
        "texts": len(texts),
        "characters": sum(len(text.text) for text in texts),
        "chat_prompts": len(prompts),
    }
