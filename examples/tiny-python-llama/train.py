"""Train the tiny Llama of this folder on the source of Python's standard library.

One run makes everything: it collects the library's own `.py` files (PSF licence), trains a byte-level BPE tokenizer on
them, trains a `LlamaForCausalLM`, keeps the weights of the best held-out loss, saves the files that `from_pretrained`
reads, loads them again and prints held-out perplexity and samples. No network.

    python train.py                                  # a GPU: minutes; a CPU: hours
    python train.py --steps 20 --batch-size 4 --output /tmp/smoke      # a look at the whole path

Needs torch, transformers, tokenizers and safetensors. The same interpreter, library versions, device and seed give the
same tokenizer and, up to the device's non-deterministic sums, the same model.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "pydoc_data", "lib-dynload", "_bundled", "data"}
TEST_FOLDERS = {"test", "tests", "idle_test"}
SAMPLE_PROMPTS = ("def ", "class ", "import os\n", "def read_lines(path, encoding='utf-8'):\n    ", "for name in ")

# One alternative per kind of run: newlines with the indentation that follows, words with one leading space, dot or
# underscore, single digits, punctuation, other space. A newline and its indentation become one token.
SPLIT = r"(?:\r?\n[ \t]*)+|[ ._]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[ \t]+(?=\S)|\s+"

# Role and text on lines of their own, in plain words: no special token beside bos and eos, so a frozen embedding knows
# every piece. The `generation` mark lets trainers find the assistant's tokens.
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- message['role'] | capitalize + ':\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] + eos_token }}{%- endgeneration %}{{- '\\n' }}"
    "{%- else %}{{- message['content'] + '\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'Assistant:\\n' }}{%- endif %}"
)


@dataclass(frozen=True)
class Corpus:
    """Source text by path relative to the library's folder; `heldout` modules are never trained on."""

    train: dict[str, str]
    heldout: dict[str, str]


def is_table(text: str) -> bool:
    """Whether a file is a generated table (code pages, Unicode data) rather than code people wrote."""
    digits = sum(c.isdigit() for c in text)
    longest = max(map(len, text.splitlines()), default=0)
    return "gencodec.py" in text[:500] or digits > 0.12 * len(text) or longest > 600


def collect(stdlib: Path, with_tests: bool, heldout_share: float) -> Corpus:
    """Read the library's source files, once per content, and set whole modules aside by the hash of their path.

    Test files only ever train. A held-out file a third of whose longer lines stand in another file (a module and its
    compatibility twin) trains too, so that the held-out loss measures unseen code.
    """
    texts: dict[str, str] = {}
    seen: set[str] = set()
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib)
        folders = set(relative.parts[:-1])
        is_test = bool(folders & TEST_FOLDERS)
        if (
            folders & SKIPPED_FOLDERS
            or relative.name.startswith(("_sysconfigdata", "bad"))
            or (is_test and not with_tests)
        ):
            continue
        try:
            text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
        except (UnicodeDecodeError, OSError):
            continue
        digest = hashlib.sha256(text.strip().encode()).hexdigest()
        if len(text) < 200 or digest in seen or is_table(text):
            continue
        seen.add(digest)
        texts[relative.as_posix()] = text
    candidates = [name for name in texts if not set(Path(name).parts[:-1]) & TEST_FOLDERS]
    chosen = {n for n in candidates if int(hashlib.sha256(n.encode()).hexdigest()[:8], 16) < heldout_share * 2**32}
    known = {line for name in texts.keys() - chosen for line in long_lines(texts[name])}
    heldout = {}
    for name in sorted(chosen):
        lines = long_lines(texts[name])
        if lines and sum(line in known for line in lines) * 3 < len(lines):
            heldout[name] = texts[name]
    return Corpus({n: t for n, t in texts.items() if n not in heldout}, heldout)


def long_lines(text: str) -> list[str]:
    """Lines of at least 30 characters, stripped: those that rarely repeat by chance."""
    return [line.strip() for line in text.splitlines() if len(line.strip()) >= 30]


def train_tokenizer(texts: list[str], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocabulary` entries: any text round-trips; Python's indentation costs one token a line."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        max_token_length=24,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, bos)]
    )
    options = {"padding_side": "right", "clean_up_tokenization_spaces": False, "model_max_length": context}
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "model_input_names": ["input_ids", "attention_mask"]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **options, **names)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[torch.Tensor]:
    """One int64 [tokens] tensor per text, without special tokens."""
    return [torch.tensor(e.ids) for e in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]


def spaces_apart(ids: torch.Tensor, tokenizer: PreTrainedTokenizerFast, share: float, seed: int) -> torch.Tensor:
    """Split `share` of the tokens that begin with a space into the space and the rest, where both are tokens.

    The tokenizer binds a space to the word after it, so a prompt that ends in a space ("def ") would else be a sequence
    the model has never seen.
    """
    vocabulary = tokenizer.get_vocab()
    space = vocabulary["\u0120"]
    rest = torch.full((len(tokenizer),), -1)
    for token, index in vocabulary.items():
        if token.startswith("\u0120") and token[1:] in vocabulary:
            rest[index] = vocabulary[token[1:]]
    generator = torch.Generator().manual_seed(seed)
    apart = (rest[ids] >= 0) & (torch.rand(len(ids), generator=generator) < share)
    pieces = torch.stack([torch.where(apart, space, -1), torch.where(apart, rest[ids], ids)], dim=1).flatten()
    return pieces[pieces >= 0]


class Windows:
    """Random training windows over the corpus: [batch, context] inputs and the tokens that follow them.

    Half of them start anywhere; the other half start with bos at a line that is not indented, as prompts do.
    """

    def __init__(self, documents: list[torch.Tensor], tokenizer: PreTrainedTokenizerFast, context: int, seed: int):
        bos, eos = torch.tensor([tokenizer.bos_token_id]), torch.tensor([tokenizer.eos_token_id])
        self.stream = torch.cat([part for d in documents for part in (bos, d, eos)])
        self.context, self.bos = context, tokenizer.bos_token_id
        ends_line = torch.zeros(len(tokenizer), dtype=torch.bool)
        for token, index in tokenizer.get_vocab().items():
            ends_line[index] = set(token) == {"\u010a"}
        starts = torch.nonzero(ends_line[self.stream]).flatten() + 1
        self.starts = starts[starts < len(self.stream) - context]
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """`size` windows as int64 (inputs, targets) on `device`."""
        half = size // 2 if len(self.starts) else 0
        at_line = self.starts[torch.randint(max(1, len(self.starts)), (half,), generator=self.generator)]
        anywhere = torch.randint(len(self.stream) - self.context, (size - half,), generator=self.generator)
        first = torch.cat([at_line - 1, anywhere])
        windows = self.stream[first[:, None] + torch.arange(self.context + 1)]
        windows[:half, 0] = self.bos
        windows = windows.to(device, non_blocking=True)
        return windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, documents: list[torch.Tensor], bos: int, context: int, batch: int) -> float:
    """Mean loss in nats per token over every token of `documents`, in chunks of `context` that each start with bos."""
    chunks = [chunk for document in documents for chunk in document.split(context)]
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64)
    was_training = model.training
    model.eval()
    for start in range(0, len(chunks), batch):
        rows = torch.nn.utils.rnn.pad_sequence(chunks[start : start + batch], batch_first=True, padding_value=-100)
        inputs = F.pad(rows[:, :-1].clamp_min(0), (1, 0), value=bos).to(device)
        logits = model(input_ids=inputs, use_cache=False).logits
        losses = F.cross_entropy(logits.float().flatten(0, 1), rows.flatten().to(device), reduction="sum")
        total += losses.double().cpu()
    model.train(was_training)
    return float(total / sum(map(len, chunks)))


def causal_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, **kwargs: float
) -> tuple[torch.Tensor, None]:
    """Causal attention over [batch, heads, tokens, head_dim] without any mask tensor.

    Our windows have no padding; Transformers' own path builds a full mask under `torch.compile`, which keeps the fast
    attention kernels from being used.
    """
    scale = kwargs.get("scaling")
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def make_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> LlamaForCausalLM:
    """The untrained model; grouped-query attention (half as many key-value heads) and tied embeddings on purpose."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads // 2,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AttentionInterface.register("causal_attention", causal_attention)
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("causal_attention")
    if args.dropout:
        # Llama has no dropout on what its blocks add to the residual stream; a hook gives it one while training.
        for layer in model.model.layers:
            for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
                module.register_forward_hook(lambda m, _, out: F.dropout(out, args.dropout, m.training))
    return model


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine down to a twentieth of the peak."""
    if step < args.warmup:
        return args.learning_rate * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def fit(model: LlamaForCausalLM, windows: Windows, heldout: list[torch.Tensor], args: argparse.Namespace) -> None:
    """Train `model` in place; at the end it holds the weights of the best held-out loss seen."""
    device = torch.device(args.device)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = model(input_ids=inputs, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    step_loss = torch.compile(loss_of) if args.compile else loss_of
    best, best_state = math.inf, model.state_dict()
    model.train()
    start = time.perf_counter()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        loss = step_loss(*windows.batch(args.batch_size, device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            measured = evaluate(model, heldout, windows.bos, args.context, 64)
            seconds = time.perf_counter() - start
            seen = (step + 1) * args.batch_size * args.context
            print(
                f"step {step + 1:5d}  train loss {loss.item():.3f}  held-out loss {measured:.4f}  "
                f"perplexity {math.exp(measured):6.2f}  {seen / 1e6:6.1f} M tokens  "
                f"{seen / len(windows.stream):5.1f} epochs  {seconds:6.1f} s",
                flush=True,
            )
            if measured < best:
                best = measured
                best_state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    model.load_state_dict(best_state)
    if device.type == "cuda":
        print(f"{torch.cuda.get_device_name()}, peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write the files `from_pretrained` reads, weights in bf16, each moved into place when all are written."""
    output.mkdir(parents=True, exist_ok=True)
    model.set_attn_implementation("sdpa")
    with tempfile.TemporaryDirectory(dir=output, prefix=".saving-") as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder, save_jinja_files=False)
        settings = Path(folder) / "tokenizer_config.json"
        # The class name that every release of Transformers knows; newer ones write one that older ones refuse.
        settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
        for path in sorted(Path(folder).iterdir()):
            path.chmod(0o644)
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
            os.replace(path, output / path.name)


def report(output: Path, corpus: Corpus, args: argparse.Namespace) -> None:
    """Load the saved files as a user would; print held-out perplexity, bits per byte and samples."""
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).to(args.device).eval()
    documents = encode(tokenizer, list(corpus.heldout.values()))
    loss = evaluate(model, documents, tokenizer.bos_token_id, args.context, 64)
    tokens, size = sum(map(len, documents)), sum(len(text.encode()) for text in corpus.heldout.values())
    print(f"parameters {sum(p.numel() for p in model.parameters())}")
    print(f"held-out perplexity {math.exp(loss):.3f}  bits per byte {loss * tokens / size / math.log(2):.4f}")
    torch.manual_seed(args.seed)
    for prompt in SAMPLE_PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt").to(args.device)
        ids = model.generate(**inputs, max_new_tokens=120, do_sample=True, temperature=0.8, top_p=0.95)
        print(f"--- {prompt!r}\n{tokenizer.decode(ids[0], skip_special_tokens=True)}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; one-line errors for what cannot work."""
    parser = argparse.ArgumentParser(description="Train the tiny Llama on Python's standard library.")
    here = Path(__file__).resolve().parent
    parser.add_argument("--output", type=Path, default=here, help="folder for the model and tokenizer files")
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="library to read")
    parser.add_argument("--tests", action=argparse.BooleanOptionalAction, default=True, help="train on its tests too")
    parser.add_argument("--heldout", type=float, default=0.05, help="share of modules kept for perplexity")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--context", type=int, default=512, help="tokens per window")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--intermediate-size", type=int, default=640)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8, help="attention heads; half as many for keys and values")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=128, help="windows per step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1, help="on what each block adds to the residual stream")
    parser.add_argument("--spaces-apart", type=float, default=0.02, help="share of words whose space is split off")
    parser.add_argument("--eval-every", type=int, default=200, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    args = parser.parse_args(argv)
    if not (args.stdlib / "os.py").is_file():
        parser.error(f"--stdlib holds no os.py, so it is no standard library: {args.stdlib}")
    if args.heads % 2 or args.hidden_size % args.heads:
        parser.error(f"--heads must be even and divide --hidden-size {args.hidden_size}, got {args.heads}")
    if args.steps < 1 or args.batch_size < 1:
        parser.error(f"--steps and --batch-size must be at least 1, got {args.steps} and {args.batch_size}")
    return args


def main() -> None:
    """Collect, tokenize, train, save, report."""
    args = parse()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    corpus = collect(args.stdlib, args.tests, args.heldout)
    train_texts, heldout_texts = list(corpus.train.values()), list(corpus.heldout.values())
    tokenizer = train_tokenizer(train_texts, args.vocabulary, args.context)
    documents, heldout = encode(tokenizer, train_texts), encode(tokenizer, heldout_texts)
    print(f"Python {sys.version.split()[0]}, library {args.stdlib}, torch {torch.__version__}, {args.device}")
    for name, texts, ids in (("train", train_texts, documents), ("held-out", heldout_texts, heldout)):
        size, tokens = sum(len(t.encode()) for t in texts), sum(map(len, ids))
        print(f"{name}: {len(texts)} files, {size} bytes, {tokens} tokens, {size / tokens:.2f} bytes per token")
    print("held-out modules:", " ".join(corpus.heldout), flush=True)
    documents = [spaces_apart(ids, tokenizer, args.spaces_apart, i) for i, ids in enumerate(documents)]
    windows = Windows(documents, tokenizer, args.context, args.seed)
    model = make_model(tokenizer, args).to(args.device)
    fit(model, windows, heldout, args)
    save(model, tokenizer, args.output)
    report(args.output, corpus, args)


if __name__ == "__main__":
    main()
