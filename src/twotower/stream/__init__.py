"""From the event log to joined samples: TFRecord shards for what learns through the day, and daily partitions."""
