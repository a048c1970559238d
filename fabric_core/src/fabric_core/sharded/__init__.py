"""Checkpoints in shards: a folder to which every rank writes what it holds, and that every strategy reads.

[Note: the sharded format] A checkpoint is a folder with these files:

- ``shard-RRRRRR.safetensors``, what rank R has written. Of a tensor that is spread over ranks, each rank writes one or
  more boxes: the offsets at which they begin, and their lengths, in each dimension.
- ``values.pt``, everything else, as the checkpoint io of the plan writes it. A tensor on the meta device stands for
  each that lies in shards.
- ``fabric.json``, the manifest, written last: what the job was, the files with their sizes, and for each tensor its
  shape, its dtype, and the boxes that make it up, each with its file, its name in there and its checksum.

It is written under another name beside its place, flushed to disk, and put there by one rename. A folder without its
manifest is not finished. Nothing in it is a pickle but ``values.pt``, which is read as tensors and plain values only.

From below: `boxes`, `dtypes`, `trees` → `shares`, `safetensors` → `manifest` → `folders` → `writing` → `stored` →
`single` → `reading` → `remainder`.
"""
