"""Look into a pipeline's stores: students' targets, and the caches that they were made from.

python examples/use_a_store.py                          # data/quickstart
python examples/use_a_store.py data/smoke
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoTokenizer

from kava_core import POLICIES, TargetsStore, TeacherStore, evict
from kava_core.eviction import CacheBatch, make_budgets


def main(pipeline: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pipeline / "teacher")

    # Targets: any records, in any order, as a trainer reads them.
    store = TargetsStore.open(pipeline / "kv_targets")
    batch = store.batch([0, 1, 2]).dequantise()
    print(f"{len(store)} records; keys of three: {list(batch.keys.shape)} [B, L', H, M, D]")

    record = store.index.record(0)
    print("\nchain of thought:", tokenizer.decode(record.cot_ids))
    print("tokens that the store keeps of it:")
    for row, heads in enumerate(batch.slot_positions[0].tolist()):
        for head, positions in enumerate(heads):
            kept = tokenizer.batch_decode([[record.cot_ids[i]] for i in positions if i >= 0])
            print(f"  layer {store.geometry.layers[row]}, head {head}: {' '.join(kept)}")

    # The teacher's whole caches: other targets are a matter of milliseconds.
    shard = TeacherStore.open(pipeline / "teacher_kv").shard(0)
    caches = CacheBatch.from_ragged(
        shard.keys.dequantise(),
        shard.values.dequantise(),
        shard.importance,
        shard.offsets,
        [record.id for record in shard.records],
    )
    budgets = make_budgets("uniform", store.geometry.model_layers, budget=2)
    print("\nof the same record, the last layer's first head would keep with two slots:")
    for name in ("rkv", "attention", "value_norm", "random"):
        positions = evict(caches, POLICIES[name](), budgets).slot_positions[0, -1, 0].tolist()
        kept = tokenizer.batch_decode([[record.cot_ids[i]] for i in positions if i >= 0])
        print(f"  {name:<10} {' '.join(kept)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", nargs="?", type=Path, default=Path("data/quickstart"))
    main(parser.parse_args().pipeline)
