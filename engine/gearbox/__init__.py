"""The change of gear: from ZeRO's partitions to tensor-parallel shards and back."""
