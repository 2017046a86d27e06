"""Decoding speed beside the peers: seconds a step, all candidates in turn, each in a process of its own.

    python benchmarks/decoding.py --shape 110M --batch 1 --peers /path/to/venv/bin/python
    python benchmarks/decoding.py --shape 110M --prefill 512 --peers /path/to/venv/bin/python

Random weights in the shape of a Llama; every candidate is fed the same tokens and computes the logits of the next. The
peers' interpreter has `llama-cpp-python`, `gguf` and `ctranslate2`; candidates that are not installed are named and left
out. Prints the median tokens per second of each, and ours over each peer round by round: median (min to max).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "width": 128,
        "layers": 2,
        "heads": 4,
        "groups": 2,
        "inner": 256,
        "vocabulary": 512,
        "tied": True,
    },
    "110M": {
        "width": 768,
        "layers": 12,
        "heads": 12,
        "groups": 12,
        "inner": 2048,
        "vocabulary": 32000,
        "tied": True,
    },
    "1.1B": {
        "width": 2048,
        "layers": 22,
        "heads": 32,
        "groups": 4,
        "inner": 5632,
        "vocabulary": 32000,
        "tied": False,
    },
}
CONTEXT, PROMPT = 1024, 16
OURS = ("ours bf16", "ours int8", "ours int4")
PEERS = ("llama.cpp bf16", "llama.cpp q8_0", "llama.cpp q4_0", "ctranslate2 int8")
Step = Callable[[int], None]
"""Reads one token of each row at a position; or a whole prompt."""


# ---- ours and transformers, in this environment


def ours(shape: dict[str, Any], kind: str, batch: int, prefill: int, folder: Path) -> Step:
    """Glasshouse: the model over its paged cache, as the engine calls it."""
    import torch

    from glasshouse.inference.paged import PagedCache, Piece, Reader
    from glasshouse.inference.quantization import quantize, settle
    from glasshouse.models import native
    from glasshouse.models.decoder import Decoder, DecoderConfig

    if not native.available():
        print("the C++ kernels are not there (they are built in the background: try again)", file=sys.stderr)
    config = DecoderConfig(
        shape["vocabulary"], shape["width"], shape["layers"], shape["heads"], shape["groups"],
        shape["width"] // shape["heads"], shape["inner"], CONTEXT, query_key_norm=False, tie_embeddings=shape["tied"],
    )  # fmt: skip
    model = Decoder(config).to(torch.bfloat16).eval()
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.03, 0.03) if parameter.dim() > 1 else parameter.data.fill_(1.0)
    model = model if kind == "bf16" else quantize(model, kind)
    settle(model)
    cache = PagedCache(model, max(batch, 1) * CONTEXT // 16, 16)
    reader = Reader(model, cache, max(batch, 1), max(prefill, 64))
    tables: list[list[int]] = [[] for _ in range(max(batch, 1))]
    for table in tables:
        assert cache.reserve(table, 0, CONTEXT)

    def step(position: int) -> None:
        if prefill:
            reader.logits(reader.read_pieces([Piece([1] * prefill, tables[0], 0)])[-1:])
        else:
            reader.logits(reader.read_rows([1] * batch, tables, [position] * batch))

    return step


def transformers_bf16(shape: dict[str, Any], kind: str, batch: int, prefill: int, folder: Path) -> Step:
    """Hugging Face transformers' LlamaForCausalLM with a static cache, eager."""
    import torch
    from transformers import LlamaForCausalLM, StaticCache

    model = LlamaForCausalLM(llama_config(shape)).to(torch.bfloat16).eval()
    cache = StaticCache(config=model.config, max_cache_len=256)

    @torch.inference_mode()
    def step(position: int) -> None:
        if prefill:
            model(torch.ones(1, prefill, dtype=torch.int64), use_cache=True, logits_to_keep=1)
        else:
            places = torch.tensor([position])
            model(torch.ones(batch, 1, dtype=torch.int64), past_key_values=cache, cache_position=places)

    return step


def llama_config(shape: dict[str, Any]) -> Any:
    """The shape, as transformers takes it."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape["vocabulary"], hidden_size=shape["width"], num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"], num_key_value_heads=shape["groups"], intermediate_size=shape["inner"],
        tie_word_embeddings=shape["tied"], max_position_embeddings=CONTEXT, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


# ---- peers, in an environment of their own


def write_gguf(shape: dict[str, Any], path: Path) -> None:
    """A Llama of random weights, in bfloat16, without a vocabulary."""
    import gguf
    import numpy as np

    writer, random = gguf.GGUFWriter(str(path), "llama"), np.random.default_rng(0)
    width, inner = shape["width"], shape["inner"]
    narrow = width // shape["heads"] * shape["groups"]
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(width)
    writer.add_block_count(shape["layers"])
    writer.add_feed_forward_length(inner)
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["groups"])
    writer.add_rope_dimension_count(width // shape["heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(shape["vocabulary"])
    writer.add_tokenizer_model("none")

    def matrix(name: str, rows: int, columns: int) -> None:
        values = random.random((rows, columns), np.float32) * np.float32(0.06) - np.float32(0.03)
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    matrix("token_embd.weight", shape["vocabulary"], width)
    if not shape["tied"]:
        matrix("output.weight", shape["vocabulary"], width)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for layer in range(shape["layers"]):
        for name, rows, columns in (
            ("attn_q", width, width), ("attn_k", narrow, width), ("attn_v", narrow, width), ("attn_output", width, width),
            ("ffn_gate", inner, width), ("ffn_up", inner, width), ("ffn_down", width, inner),
        ):  # fmt: skip
            matrix(f"blk.{layer}.{name}.weight", rows, columns)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(shape: dict[str, Any], kind: str, batch: int, prefill: int, folder: Path) -> Step:
    """llama.cpp through llama-cpp-python's low-level functions; its own quantizer makes q8_0 and q4_0 of the bf16 file."""
    import llama_cpp as library

    path = folder / f"{kind}.gguf"
    if kind == "bf16":
        write_gguf(shape, path)
    else:
        settings = library.llama_model_quantize_default_params()
        settings.ftype = {"q8_0": library.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": library.LLAMA_FTYPE_MOSTLY_Q4_0}[
            kind
        ]
        assert (
            library.llama_model_quantize(str(folder / "bf16.gguf").encode(), str(path).encode(), settings)
            == 0
        )
    threads = len(os.sched_getaffinity(0))
    model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
    settings = library.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = max(batch, 1) * 256 + prefill, 512, 512
    settings.n_seq_max, settings.n_threads, settings.n_threads_batch = max(batch, 1), threads, threads
    context = library.llama_init_from_model(model, settings)
    count = prefill or batch
    tokens = library.llama_batch_init(count, 0, 1)
    tokens.n_tokens = count

    def step(position: int) -> None:
        if prefill:
            library.llama_memory_clear(library.llama_get_memory(context), True)
        for place in range(count):
            tokens.token[place], tokens.n_seq_id[place] = 1, 1
            tokens.pos[place] = place if prefill else position
            tokens.seq_id[place][0] = 0 if prefill else place
            tokens.logits[place] = not prefill or place == count - 1
        assert library.llama_decode(context, tokens) == 0
        library.llama_get_logits(context)[0]

    for position in range(0 if prefill else PROMPT):
        step(position)
    return step


def ctranslate2_int8(shape: dict[str, Any], kind: str, batch: int, prefill: int, folder: Path) -> Step:
    """CTranslate2 with int8 weights and activations; a step is the time of 33 tokens less that of one, over 32."""
    import ctranslate2

    generator = ctranslate2.Generator(
        str(folder / "ctranslate2"), compute_type="int8", intra_threads=len(os.sched_getaffinity(0))
    )
    prompt = ["t1"] * (prefill or PROMPT)

    def step(position: int) -> None:
        if prefill:
            generator.forward_batch([prompt])
            return
        generator.generate_batch(
            [prompt] * batch,
            max_length=position,
            min_length=position,
            include_prompt_in_result=False,
            beam_size=1,
        )

    return step


def write_ctranslate2(shape: dict[str, Any], folder: Path, peers: str) -> None:
    """What its converter makes of a folder that transformers wrote; the converter finds both in one process."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    LlamaForCausalLM(llama_config(shape)).to(torch.bfloat16).save_pretrained(folder / "transformers")
    words = {"<unk>": 0, **{f"t{number}": number for number in range(1, shape["vocabulary"])}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    special = {"unk_token": "<unk>", "bos_token": "t1", "eos_token": "t2"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder / "transformers")
    found = subprocess.run(
        [peers, "-c", "import ctranslate2; print(ctranslate2.__path__[0])"],
        capture_output=True,
        text=True,
        check=True,
    )
    code = (
        f"import sys; sys.path.append({str(Path(found.stdout.strip()).parent)!r})\n"
        "from ctranslate2.converters import TransformersConverter\n"
        f"TransformersConverter({str(folder / 'transformers')!r}).convert({str(folder / 'ctranslate2')!r}, quantization='int8')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- measuring

CANDIDATES = {
    "ours": ours, "transformers": transformers_bf16, "llama.cpp": llama_cpp, "ctranslate2": ctranslate2_int8,
}  # fmt: skip


class Worker:
    """A candidate in a process of its own; it measures when told.

    Args:
        label: its name and its number format.
        python: the interpreter that has it.
        options: the command line.
        folder: where files are shared.
    """

    def __init__(self, label: str, python: str, options: argparse.Namespace, folder: Path):
        command = [python, __file__, "--worker", label, "--shape", options.shape, "--folder", str(folder)]
        command += [
            "--batch",
            str(options.batch),
            "--prefill",
            str(options.prefill),
            "--steps",
            str(options.steps),
        ]
        self.label, errors = label, open(folder / f"{label}.log", "w")  # noqa: SIM115  (the process writes to it)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        self.is_ready = self.answer() == "ready"

    def answer(self) -> str:
        """The next line of the worker; empty when it has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def measure(self) -> float:
        """Median seconds of some steps."""
        assert self.process.stdin is not None
        self.process.stdin.write("measure\n")
        self.process.stdin.flush()
        return float(self.answer())


def work(options: argparse.Namespace) -> None:
    """The worker's side: build the candidate, then some steps for every line that comes in."""
    name, kind = options.worker.split()
    threads = len(os.sched_getaffinity(0))
    if name in ("ours", "transformers"):
        import torch

        torch.set_num_threads(threads)
    step = CANDIDATES[name](SHAPES[options.shape], kind, options.batch, options.prefill, Path(options.folder))
    position = PROMPT
    step(position)
    print("ready", flush=True)
    for _ in sys.stdin:
        times = []
        if name == "ctranslate2" and not options.prefill:
            spans = []
            for length in (1, 33):
                started = time.perf_counter()
                step(length)
                spans.append(time.perf_counter() - started)
            times = [(spans[1] - spans[0]) / 32]
        else:
            for _ in range(options.steps):
                position = position + 1 if position < 200 else PROMPT
                started = time.perf_counter()
                step(position)
                times.append(time.perf_counter() - started)
        print(statistics.median(times), flush=True)


def start(options: argparse.Namespace, folder: Path) -> dict[str, Worker]:
    """A worker for every candidate that is installed."""
    labels = dict.fromkeys([*OURS, "transformers bf16"], sys.executable)
    if options.peers:
        labels |= dict.fromkeys(PEERS, options.peers)
    workers = {}
    for label, python in labels.items():
        if options.only and not any(word in label for word in options.only):
            continue
        try:
            if label.startswith("ctranslate2"):
                write_ctranslate2(SHAPES[options.shape], folder, python)
            worker = Worker(label, python, options, folder)
        except (ImportError, subprocess.CalledProcessError) as error:
            print(f"{label}: left out, {error}")
            continue
        if worker.is_ready:
            workers[label] = worker
        else:
            said = (folder / f"{label}.log").read_text().strip().splitlines()
            print(f"{label}: left out, {said[-1] if said else 'it ended'}", flush=True)
    return workers


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="110M")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prefill", type=int, default=0, help="tokens of a prompt, instead of decoding")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="steps in a round")
    parser.add_argument("--peers", default="", help="an interpreter that has llama_cpp, gguf and ctranslate2")
    parser.add_argument("--only", nargs="*", default=[], help="words in the names of the candidates to run")
    parser.add_argument("--json", default="", help="write the seconds of every round here")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options)
    with tempfile.TemporaryDirectory() as folder:
        workers = start(options, Path(folder))
        seconds: dict[str, list[float]] = {label: [] for label in workers}
        for _ in range(options.rounds):
            for label, worker in workers.items():
                seconds[label].append(worker.measure())
        for worker in workers.values():
            worker.process.communicate()
    show(options, seconds)
    if options.json:
        Path(options.json).write_text(json.dumps({"options": vars(options), "seconds": seconds}))
    return None


def show(options: argparse.Namespace, seconds: dict[str, list[float]]) -> None:
    """The table: tokens per second, and ours over each peer."""
    tokens = options.prefill or options.batch
    what = f"prefill of {tokens} tokens" if options.prefill else f"decoding, batch {tokens}"
    print(f"\n{options.shape}, {what}, {len(os.sched_getaffinity(0))} threads, {options.rounds} rounds")
    mine = [label for label in seconds if label in OURS]
    print(" " * 20 + "tokens/s".rjust(10) + "".join(f"{label + ' over it':>26}" for label in mine))
    for label, times in seconds.items():
        line = f"{label:20}{tokens / statistics.median(times):10,.1f}"
        for own in mine if label not in OURS else ():
            ratios = [theirs / ours for ours, theirs in zip(seconds[own], times, strict=True)]
            line += f"{f'{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})':>26}"
        print(line)


if __name__ == "__main__":
    main()
