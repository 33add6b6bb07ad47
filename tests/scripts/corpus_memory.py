"""Memory and seconds that the recipe's corpus takes on each process, as one line of JSON.

    torchrun --standalone --nproc_per_node 2 -m tests.scripts.corpus_memory --megabytes 100

The corpus is the embedded one, repeated in files of its size. Memory is what the kernel says of this process (PSS,
where pages that several processes use count in shares), less what it was before: of its own (anonymous), and pages of
files, which the kernel can drop. Run it twice: the second start finds what the first has kept.
"""

import argparse
import gc
import json
import resource
import tempfile
import time
from pathlib import Path

import torch
from accelerate import PartialState

from recipes.lib.corpus import load_documents
from recipes.pretrain_bert import RecipeArguments, load_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "hf_lamb_corpus_memory"))
    options = parser.parse_args()
    state = PartialState(cpu=True)
    if state.is_main_process:
        write_corpus(options.folder, options.megabytes)
    state.wait_for_everyone()
    before, start, cpu = memory(), time.perf_counter(), time.process_time()
    with state.main_process_first():
        data = load_data(RecipeArguments(corpus=[str(options.folder)], max_seq_length=128), seed=0)
    loaded, cpu = time.perf_counter() - start, time.process_time() - cpu
    gc.collect()
    state.wait_for_everyone()
    after = memory()
    state.wait_for_everyone()
    rows = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    for some in rows[state.process_index :: state.num_processes].split(32):
        data.train.__getitems__(some.tolist())
    masked = time.perf_counter() - start
    state.wait_for_everyone()
    read = memory()
    state.wait_for_everyone()
    tokens = (len(data.train) + len(data.held_out)) * 128
    for process in range(state.num_processes):
        if process == state.process_index:
            print(
                json.dumps(
                    {
                        "process": process,
                        "tokens": tokens,
                        "seconds_to_load": round(loaded, 1),
                        "of_them_on_a_cpu": round(cpu, 1),
                        "seconds_to_mask_its_rows": round(masked, 1),
                        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6),
                        **{f"bytes_per_token_{k}": round((after[k] - before[k]) / tokens, 2) for k in after},
                        **{f"bytes_per_token_{k}_all_read": round((read[k] - before[k]) / tokens, 2) for k in read},
                    }
                ),
                flush=True,
            )
        state.wait_for_everyone()
    state.destroy_process_group()


def write_corpus(folder: Path, megabytes: int) -> None:
    """Documents of some thousand characters in files of some megabytes."""
    folder.mkdir(exist_ok=True)
    documents, written = load_documents("embedded"), 0
    for number in range(1000):
        parts = []
        for document in documents:
            for start in range(0, len(document.text), 5000):
                parts.append(f"=== {number} {document.name} {start} ===\n{document.text[start : start + 5000]}\n")
        text = "".join(parts)[: megabytes * 10**6 - written]
        written += len(text)
        if not text:
            return
        file = folder / f"{number:03}.txt"
        if not file.exists() or file.stat().st_size < len(text):
            file.write_text(text)


def memory() -> dict[str, int]:
    """Bytes of this process: its own, and its share of pages of files."""
    lines = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]]
    kilobytes = {name.rstrip(":"): int(value) for name, value, *_ in lines}
    return {
        "own": kilobytes["Pss_Anon"] * 1024 + kilobytes["Pss_Shmem"] * 1024,
        "files": kilobytes["Pss_File"] * 1024,
    }


if __name__ == "__main__":
    main()
