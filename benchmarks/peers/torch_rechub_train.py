"""torch-rechub's DSSM with in-batch negatives on exported rows: seconds of an epoch after a warm-up, as one JSON line.

    python torch_rechub_train.py ROWS.npz --batch 4096 --rows 131072 --threads 2

Its trainer takes all other rows of the batch as negatives, without a log q correction, without masking the item's own
copies or the user's other positives and without a temperature; its loader assembles rows one by one.
"""

import argparse
import json
import tempfile
import time

import numpy as np
import torch
from torch_rechub.basic.features import DenseFeature, SequenceFeature, SparseFeature
from torch_rechub.models.matching import DSSM
from torch_rechub.trainers import MatchTrainer
from torch_rechub.utils.data import TorchDataset

WIDTH = 64
"""Of every embedding: this library sets them side by side only if they are all alike."""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rows-used", type=int, default=131072)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    stored = np.load(arguments.rows)
    size = {name.removeprefix("size."): int(stored[name]) for name in stored if name.startswith("size.")}
    order = np.random.default_rng(0).permutation(len(stored["user_id"]))[: arguments.rows_used]
    names = ["user_id", "gender", "age", "occupation", "history", "item_id", "genres"]
    rows = {name: stored[name][order].astype(np.int64) for name in names}
    rows["year"] = stored["year"][order][:, 0]
    user = [SparseFeature(n, size[n], WIDTH) for n in ("user_id", "gender", "age", "occupation")]
    user.append(SequenceFeature("history", size["item_id"], WIDTH, "mean", "item_id", padding_idx=0))
    item = [
        SparseFeature("item_id", size["item_id"], WIDTH),
        SequenceFeature("genres", size["genres"], WIDTH, "mean", padding_idx=0),
        DenseFeature("year"),
    ]
    shape = {"dims": [256, 128, 64], "activation": "relu"}
    model = DSSM(user, item, dict(shape), dict(shape))
    with tempfile.TemporaryDirectory() as folder:
        trainer = MatchTrainer(model, mode=2, in_batch_neg=True, n_epoch=1, model_path=folder)

        def epoch(count):
            part = {name: value[:count] for name, value in rows.items()}
            data = TorchDataset(part, np.zeros(count, np.float32))
            loader = torch.utils.data.DataLoader(data, batch_size=arguments.batch, shuffle=True)
            started = time.perf_counter()
            trainer.train_one_epoch(loader)
            return time.perf_counter() - started

        epoch(4 * arguments.batch)
        seconds = epoch(arguments.rows_used)
    print(json.dumps({"rows": arguments.rows_used, "epoch_s": [seconds]}))


if __name__ == "__main__":
    main()
