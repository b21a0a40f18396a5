"""Answers one question with plain transformers and PEFT: `python -P plain.py QUESTION ANSWER`.

It is run as a file, in a process where nothing of this package is imported, to see that an export needs
nothing of it. `runner.train.export` imports it, too, so that both ask the same.

    QUESTION    {"load": lines of Python after which `model` and `processor` are there, "against": [[id]]}
    ANSWER      {"input_ids": [id], "steps": [{"token", "ids", "logits", "scale"}], "foreign": [module]}
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

SIZE = 224
"""Pixels of a side; a size that every architecture takes."""
TEXT = "What does the image show?"
NEW_TOKENS = 16
LOOKED_AT = 10


def question(processor: Any) -> Any:
    """Tensors of a question about an image that is made here: colours that change from corner to corner."""
    gradient = Image.linear_gradient("L").resize((SIZE, SIZE))
    image = Image.merge("RGB", (gradient, gradient.rotate(90), gradient.rotate(180)))
    content = [{"type": "image"}, {"type": "text", "text": TEXT}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=prompt, images=[image], return_tensors="pt")


def answer(model: Any, processor: Any, against: Sequence[Sequence[int]] = ()) -> dict[str, Any]:
    """The greedy answer, a step for every token.

    Args:
        against: ids of each step whose logits are wanted; where there are none, those of the likeliest.
    """
    inputs = question(processor).to(model.device, model.dtype)
    with torch.no_grad():
        output = model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=NEW_TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
        )
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    steps = []
    for number, (token, logits) in enumerate(zip(tokens, output.logits, strict=True)):
        row = logits[0].float()
        given = list(against[number]) if number < len(against) else row.topk(LOOKED_AT).indices.tolist()
        steps.append(
            {"token": token, "ids": given, "logits": row[given].tolist(), "scale": row.abs().max().item()}
        )
    return {"input_ids": inputs["input_ids"][0].tolist(), "steps": steps}


def main() -> None:
    """Load as the question says, and answer it."""
    asked, file = map(Path, sys.argv[1:])
    document = json.loads(asked.read_text(encoding="utf-8"))
    loaded: dict[str, Any] = {}
    exec(document["load"], loaded)
    model, processor = loaded["model"], loaded["processor"]
    if torch.cuda.is_available() and model.device.type == "cpu":
        model = model.to("cuda")
    found = answer(model.eval(), processor, document["against"])
    found["foreign"] = sorted(name for name in sys.modules if name.partition(".")[0] == "runner")
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(found), encoding="utf-8")
    temporary.replace(file)


if __name__ == "__main__":
    main()
