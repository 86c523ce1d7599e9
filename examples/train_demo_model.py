"""Trains a tiny story model from text files and writes it as an ordinary Hugging Face folder.

    python examples/train_demo_model.py OUT_DIR TEXT [TEXT ...] --steps 3000 --seed 1

`models/demo` was made this way. In a text file a blank line parts two paragraphs of a story and
a single line break parts two stories, as in the excerpts of TinyStories that it was made from.

The model itself is in tiny_llama.py beside this file.

Shapes: B windows in a batch, N windows, T tokens in a window. Losses are in nats per token.
"""

import argparse
import math
import random
import re
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tiny_llama import BOS, BOS_ID, EOS, EOS_ID, TEMPERATURE, TOP_P, Shape, StoryModel, save, tell
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

PROMPTS = ("Once upon a time", "Tom had a red ball.", "One day, a little fish named")


# --- text ----------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """Repairs quotation marks that were UTF-8 read as Windows-1252, and makes quotes plain."""
    for wrong, right in (("â€œ", '"'), ("â€™", "'"), ("â€“", "-"), ("â€”", "-"), ("â€", '"')):
        text = text.replace(wrong, right)
    return text.translate(str.maketrans("“”‘’", "\"\"''"))


def split_stories(text: str, short_chars: int = 300) -> list[str]:
    """Splits at single line breaks.

    Some stories have single line breaks between their paragraphs too; those pieces are short and
    have no blank line, so short neighbours are taken for paragraphs of one story.
    """
    stories: list[str] = []
    was_short = False
    for piece in (p.strip() for p in re.split(r"(?<!\n)\n(?!\n)", clean(text))):
        is_short = len(piece) < short_chars and "\n" not in piece
        if piece and stories and is_short and was_short:
            stories[-1] += "\n\n" + piece
        elif piece:
            stories.append(piece)
        was_short = is_short
    return stories


def hold_out(stories: list[str], share: float, rng: random.Random) -> tuple[list[str], list[str]]:
    """Returns (stories to train on, stories held out); exact duplicates are dropped first."""
    unique = list(dict.fromkeys(stories))
    rng.shuffle(unique)
    num_held = max(1, round(share * len(unique)))
    return unique[num_held:], unique[:num_held]


# --- tokenizer -----------------------------------------------------------------------------------


def train_tokenizer(stories: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: every byte is in the vocabulary, so any text survives a round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID), (EOS, EOS_ID)]
    )
    return tokenizer


def encode_stream(tokenizer: Tokenizer, stories: list[str]) -> Tensor:
    """All stories as one row of ids, each story as BOS ... EOS."""
    return torch.tensor([i for e in tokenizer.encode_batch(stories) for i in (*e.ids, EOS_ID)])


def windows(stream: Tensor, num_tokens: int, offset: int = 0) -> Tensor:
    """Cuts a stream into [N, T + 1] windows that share their edge tokens: inputs and targets."""
    return stream[offset:].unfold(0, num_tokens + 1, num_tokens)


# --- training ------------------------------------------------------------------------------------


def batches(
    tokenizer: Tokenizer, stories: list[str], shape: Shape, args: argparse.Namespace
) -> Iterator[Tensor]:
    """Batches [B, T + 1] for ever; each epoch orders, tokenises and cuts the stories anew.

    Few texts are soon learnt by heart. BPE dropout (merges left out at random) shows the same
    text in other pieces; it fades, and in the last third the pieces are those seen when serving.
    """
    rng, step = random.Random(args.seed), 0
    while True:
        rng.shuffle(stories)
        fading = args.bpe_dropout * (1 - 1.5 * step / args.steps)
        tokenizer.model.dropout = fading if fading > 0 else None
        stream = encode_stream(tokenizer, stories)
        tokenizer.model.dropout = None
        rows = windows(stream, shape.max_tokens, rng.randrange(shape.max_tokens))
        epoch = rows[torch.randperm(len(rows))].split(args.batch)
        step += len(epoch)
        yield from epoch


def make_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW; norms are not decayed."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))


def schedule(step: int, num_steps: int, num_warmup: int = 100) -> float:
    """Share of the full learning rate: linear warm-up, then a cosine down to 2 %."""
    progress = min(1.0, step / num_steps)
    return min((step + 1) / num_warmup, 0.51 + 0.49 * math.cos(math.pi * progress))


def mean_loss(model: StoryModel, batch: Tensor) -> Tensor:
    """Loss of windows [B, T + 1]. bfloat16 while training: much faster where the CPU has AMX."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=model.training):
        logits = model(batch[:, :-1])
    return cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: StoryModel, rows: Tensor) -> float:
    """Mean loss over held-out windows [N, T + 1], in float32 and without dropout."""
    model.eval()
    losses = [float(mean_loss(model, batch)) * len(batch) for batch in rows.split(8)]
    model.train()
    return sum(losses) / len(rows)


def train(
    model: StoryModel, data: Iterator[Tensor], held: Tensor, args: argparse.Namespace
) -> dict[str, float]:
    """Leaves the weights with the best held-out loss in `model`; returns what was measured."""
    optimizer = make_optimizer(model, args)
    scale = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: schedule(s, args.steps))
    best, weights, started_s = {"loss": math.inf}, model.state_dict(), time.monotonic()
    for step in range(1, args.steps + 1):
        loss = mean_loss(model, next(data))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scale.step()
        if step % args.eval_every == 0 or step == args.steps:
            held_loss, elapsed_s = held_out_loss(model, held), time.monotonic() - started_s
            print(f"{step} train {loss:.3f} held out {held_loss:.4f} {elapsed_s:.0f} s", flush=True)
            if held_loss < best["loss"]:
                best = {"loss": held_loss, "step": step}
                weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(weights)
    return best | {"minutes": (time.monotonic() - started_s) / 60}


# --- the model card -----------------------------------------------------------------------------

CARD_TEMPLATE = Path(__file__).with_name("demo_model_card.md")


def show_samples(model: StoryModel, tokenizer: Tokenizer) -> str:
    """Stories as Markdown quotations."""
    stories = [(p, tell(model, tokenizer, p, greedy=False)) for p in PROMPTS]
    stories.append((PROMPTS[0], tell(model, tokenizer, PROMPTS[0], greedy=True)))
    quotes = [f"**{prompt}**{story[len(prompt) :]}" for prompt, story in stories]
    return "\n\n---\n\n".join("> " + quote.replace("\n", "\n> ") for quote in quotes)


def write_card(
    model: StoryModel,
    tokenizer: Tokenizer,
    args: argparse.Namespace,
    facts: dict[str, float],
    told: list[str],
    held: list[str],
) -> str:
    """Fills in the card; `facts` are what `train` returned, measured again after rounding."""
    held_tokens = len(encode_stream(tokenizer, held))
    held_bytes = sum(len(story.encode()) for story in held)
    torch.manual_seed(args.seed)
    return CARD_TEMPLATE.read_text(encoding="utf-8").format(
        args=args,
        shape=model.shape,
        command=command_line(),
        num_params=sum(p.numel() for p in model.parameters()),
        num_told=len(told),
        num_held=len(held),
        num_held_tokens=held_tokens,
        bits_per_byte=facts["loss"] / math.log(2) * held_tokens / held_bytes,
        epochs=args.steps * args.batch * model.shape.max_tokens / facts["num_told_tokens"],
        temperature=TEMPERATURE,
        top_p=TOP_P,
        samples=show_samples(model, tokenizer),
        **facts,
    )


# --- the command line ---------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    """The defaults are what models/demo was made with."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--bpe-dropout", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=0.3)
    parser.add_argument("--held-out", type=float, default=0.03, help="share of the stories")
    parser.add_argument("--eval-every", type=int, default=100, help="steps")
    parser.add_argument("--data", default="the texts in the command.", help="for the card")
    parser.add_argument("--hardware", default="a CPU", help="for the card")
    return parser.parse_args()


def load_stories(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Returns (stories to train on, stories held out) of all texts."""
    stories = [s for path in args.texts for s in split_stories(path.read_text(encoding="utf-8"))]
    return hold_out(stories, args.held_out, random.Random(args.seed))


def command_line() -> str:
    """The command as typed, but of an absolute path its last part: the rest is nobody's."""
    folder_free = [Path(w).name if Path(w).is_absolute() else w for w in sys.argv[1:]]
    return shlex.join(["python", "examples/train_demo_model.py", *folder_free])


def main() -> None:
    """Texts in, folder out."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    told, held = load_stories(args)
    shape = Shape()
    tokenizer = train_tokenizer(told, shape.vocab_size)
    held_stream = encode_stream(tokenizer, held)
    held_rows = windows(held_stream, shape.max_tokens)
    model = StoryModel(shape, args.dropout)
    facts = train(model, batches(tokenizer, told, shape, args), held_rows, args)
    # Measure and tell with what is stored, not with the more exact weights it was rounded from.
    model.load_state_dict({name: w.bfloat16() for name, w in model.state_dict().items()})
    facts["loss"] = held_out_loss(model, held_rows)
    facts["num_told_tokens"] = len(encode_stream(tokenizer, told))
    save(args.out, model, tokenizer)
    card = write_card(model, tokenizer, args, facts, told, held)
    (args.out / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
