"""TensorFlow Recommenders on exported rows: seconds of each epoch after the first, as one JSON line.

    TF_USE_LEGACY_KERAS=1 python tfrs_train.py ROWS.npz --batch 4096 --epochs 2 --threads 2

Input is batched and cached in memory. The item's own copies in the batch are no negatives and the candidates' sampling
probability is subtracted; a user's other positives are not masked, which this library has no way for.
"""

import argparse
import json
import time

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs

keras = tf.keras


class Mean(keras.layers.Layer):
    """The mean of the embeddings of a padded list; 0 is padding."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def call(self, ids):
        there = tf.cast(ids > 0, tf.float32)[:, :, None]
        total = tf.reduce_sum(self.table(ids) * there, axis=1)
        return total / tf.maximum(tf.reduce_sum(there, axis=1), 1.0)


class TwoTower(tfrs.Model):
    def __init__(self, sizes, widths):
        super().__init__()
        self.embeddings = {name: keras.layers.Embedding(size, widths[name]) for name, size in sizes.items()}
        self.clicked = Mean(self.embeddings["item_id"])
        self.genres = Mean(self.embeddings["genres"])
        self.user_tower, self.item_tower = (
            keras.Sequential([keras.layers.Dense(256, "relu"), keras.layers.Dense(128, "relu"), keras.layers.Dense(64)])
            for _ in range(2)
        )
        self.task = tfrs.tasks.Retrieval(temperature=0.07, remove_accidental_hits=True)

    def compute_loss(self, rows, training=False):
        user = [self.embeddings[name](rows[name]) for name in ("user_id", "gender", "age", "occupation")]
        user.append(self.clicked(rows["history"]))
        item = [self.embeddings["item_id"](rows["item_id"]), self.genres(rows["genres"]), rows["year"]]
        users = tf.math.l2_normalize(self.user_tower(tf.concat(user, axis=1)), axis=1)
        items = tf.math.l2_normalize(self.item_tower(tf.concat(item, axis=1)), axis=1)
        return self.task(
            users,
            items,
            candidate_sampling_probability=rows["q"],
            candidate_ids=rows["item_id"],
            compute_metrics=False,
            compute_batch_metrics=False,
        )


class Clock(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self.started = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.started)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(arguments.threads)
    tf.config.threading.set_inter_op_parallelism_threads(arguments.threads)
    tf.random.set_seed(0)
    stored = np.load(arguments.rows)
    sizes = {name.removeprefix("size."): int(stored[name]) for name in stored if name.startswith("size.")}
    widths = {name.removeprefix("width."): int(stored[name]) for name in stored if name.startswith("width.")}
    rows = {name: stored[name] for name in stored if "." not in name}
    count = len(rows["user_id"]) // arguments.batch * arguments.batch
    order = np.random.default_rng(0).permutation(len(rows["user_id"]))[:count]
    data = tf.data.Dataset.from_tensor_slices({name: value[order] for name, value in rows.items()})
    data = data.batch(arguments.batch).cache().prefetch(2)
    model, clock = TwoTower(sizes, widths), Clock()
    model.compile(optimizer=keras.optimizers.Adagrad(0.1))
    model.fit(data, epochs=arguments.epochs, verbose=0, callbacks=[clock])
    print(json.dumps({"rows": count, "epoch_s": clock.seconds[1:]}))


if __name__ == "__main__":
    main()
