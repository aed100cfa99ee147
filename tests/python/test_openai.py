"""Checks a running Shoal through the unmodified `openai` package.

    python test_openai.py BASE_URL [API_KEY]

Every file and vector store made here is deleted at the end, whatever happens. One line is printed
per check; the exit code is 1 when any of them failed.
"""

import base64
import math
import sys
import time
import traceback
import uuid

import openai
from openai import OpenAI

DIMENSIONS = 384
EVENTUALLY_SECONDS = 60
POLL_MS = 100
MISSING_FILE = "file-" + "0" * 32
MISSING_STORE = "vs_" + "0" * 32

VOLCANO = """How volcanoes erupt

Magma rises from the mantle because it is lighter than the rock around it. Near the surface the
gas dissolved in it expands, and the pressure drives lava and ash out of the crater. A stratovolcano
erupts violently, while a shield volcano lets its runny lava flow quietly down the slopes.
"""

BREAD = """# Baking sourdough bread

Feed the starter the evening before. Mix flour, water and salt, then fold the dough every half hour.

## The oven

Bake the loaf in a hot cast-iron pot for forty minutes, until the crust is dark and crisp.
"""

BICYCLE = """<!DOCTYPE html>
<html><head><title>Bicycle repair</title>
<style>.hidden-style { color: red }</style><script>var hiddenScript = 1;</script></head>
<body><h1>Repairing a bicycle</h1>
<p>To fix a flat tyre, take the wheel off, lever the tyre from the rim and patch the inner tube.</p>
<p>A worn chain skips over the sprockets &amp; has to be replaced; oil the new one sparingly.</p>
</body></html>
"""

TEA = """绿茶的冲泡方法

冲泡绿茶时水温不宜过高，一般在八十度左右。先用热水温杯，再放入三克茶叶，沿杯壁注入开水，
两三分钟后即可饮用。龙井茶产于杭州西湖一带，香气清新，滋味鲜爽。
"""

RAILWAY = """# 高速铁路

中国的高速列车最高运营时速可达三百五十公里。京沪高铁连接北京和上海，全程大约四个半小时。
乘客可以在网上购买车票，凭身份证进站乘车。
"""

DOCUMENTS = {
    "volcano.txt": (VOLCANO, "text/plain", {"topic": "geology", "language": "en", "year": 2019, "public": True}),
    "bread.md": (BREAD, "text/markdown", {"topic": "cooking", "language": "en", "year": 2021, "public": True}),
    "bicycle.html": (BICYCLE, "text/html", {"topic": "repair", "language": "en", "year": 2023, "public": False}),
    "绿茶.txt": (TEA, "text/plain", {"topic": "cooking", "language": "zh", "year": 2020, "public": False}),
    "高铁.md": (RAILWAY, "text/markdown", {"topic": "transport", "language": "zh", "year": 2024, "public": True}),
}

QUESTIONS = [
    ("Why does lava come out of a mountain?", "volcano.txt"),
    ("What makes molten rock push up through the ground?", "volcano.txt"),
    ("How long should a loaf stay in the oven?", "bread.md"),
    ("my bike has a puncture, what should I do", "bicycle.html"),
    ("泡茶用多少度的水？", "绿茶.txt"),
    ("西湖附近出产什么饮品", "绿茶.txt"),
    ("从北京坐火车到上海要多久", "高铁.md"),
    ("列车能开多快", "高铁.md"),
]


class Report:
    """Counts checks and prints one line for each."""

    def __init__(self):
        self.passed = 0
        self.failed = 0

    def check(self, what, holds, detail=""):
        if holds:
            self.passed += 1
            print(f"ok    {what}")
        else:
            self.failed += 1
            print(f"FAIL  {what}  {detail}")

    def equal(self, what, got, wanted):
        self.check(what, got == wanted, f"got {got!r}, wanted {wanted!r}")

    def refused(self, what, status, call):
        """The call must be refused with the status, in OpenAI's error shape."""
        try:
            answer = call()
        except openai.APIStatusError as error:
            self.equal(what, error.status_code, status)
            body = error.body
            is_shaped = (
                isinstance(body, dict)
                and {"message", "type", "param", "code"} <= body.keys()
                and isinstance(body["message"], str)
                and body["message"]
                and isinstance(body["type"], str)
            )
            self.check(f"{what}: the error has OpenAI's shape", is_shaped, repr(body))
        else:
            self.check(what, False, f"not refused: {answer!r}")

    def section(self, test, *args):
        try:
            test(self, *args)
        except Exception:
            self.check(f"{test.__name__} runs to its end", False, traceback.format_exc())


class Resources:
    """Makes files and vector stores, and deletes them in the end."""

    def __init__(self, client):
        self.client = client
        self.files = []
        self.stores = []

    def file(self, name, content, kind="text/plain"):
        data = content if isinstance(content, bytes) else content.encode()
        made = self.client.files.create(file=(name, data, kind), purpose="assistants")
        self.files.append(made.id)
        return made

    def store(self, **options):
        made = self.client.vector_stores.create(name=f"test-{uuid.uuid4().hex[:12]}", **options)
        self.stores.append(made.id)
        return made

    def attach(self, store, file, **options):
        return self.client.vector_stores.files.create_and_poll(
            file.id, vector_store_id=store.id, poll_interval_ms=POLL_MS, **options
        )

    def delete_all(self):
        for id in self.stores:
            delete_quietly(self.client.vector_stores.delete, id)
        for id in self.files:
            delete_quietly(self.client.files.delete, id)


class Library:
    """A vector store that holds `DOCUMENTS`."""

    def __init__(self, client, resources):
        self.client = client
        self.store = resources.store(metadata={"suite": "library"})
        self.files = {}
        self.attached = {}
        for name, (content, kind, attributes) in DOCUMENTS.items():
            self.files[name] = resources.file(name, content, kind)
            self.attached[name] = resources.attach(self.store, self.files[name], attributes=attributes)

    def search(self, query, **options):
        return self.client.vector_stores.search(self.store.id, query=query, **options)

    def names(self, query, **options):
        return {hit.filename for hit in self.search(query, **options).data}


def delete_quietly(delete, id):
    try:
        delete(id)
    except openai.NotFoundError:
        pass


def is_eventually(predicate):
    deadline = time.monotonic() + EVENTUALLY_SECONDS
    while time.monotonic() < deadline:
        if predicate():
            return True
        time.sleep(POLL_MS / 1000)
    return False


def is_recent(seconds):
    return isinstance(seconds, int) and abs(seconds - time.time()) < 600


def ids(items):
    return [item.id for item in items]


def hit_files(page):
    return {hit.file_id for hit in page.data}


def test_models(report, client):
    listed = client.models.list()
    report.check("a model is listed", len(listed.data) > 0)
    report.equal("the list is a list", listed.object, "list")
    for model in listed.data:
        found = client.models.retrieve(model.id)
        fields = (found.id, found.object, found.created, found.owned_by)
        report.equal(f"{model.id} is retrieved", fields, (model.id, "model", model.created, model.owned_by))
        report.check(f"{model.id} has an owner and a time", isinstance(found.created, int) and found.owned_by)
    report.refused("a missing model", 404, lambda: client.models.retrieve("no-such-model"))


def dot(left, right):
    return sum(a * b for a, b in zip(left, right, strict=True))


def test_embeddings(report, client):
    model = client.models.list().data[0].id
    texts = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "The stock market fell.", "猫在沙发上睡觉。"]
    answer = client.embeddings.create(model=model, input=texts)
    report.equal("the answer's object and model", (answer.object, answer.model), ("list", model))
    shape = [(item.object, item.index, len(item.embedding)) for item in answer.data]
    report.equal("one vector for each text", shape, [("embedding", n, DIMENSIONS) for n in range(len(texts))])
    usage = answer.usage
    report.check("usage is told", 0 < usage.prompt_tokens <= usage.total_tokens, repr(usage))
    vectors = [item.embedding for item in answer.data]
    report.check("vectors have unit norm", all(abs(math.sqrt(dot(v, v)) - 1) < 1e-3 for v in vectors))
    report.check("alike texts are nearer", dot(vectors[0], vectors[1]) > dot(vectors[0], vectors[2]))
    report.check("so across languages", dot(vectors[0], vectors[3]) > dot(vectors[2], vectors[3]))

    floats = client.embeddings.create(model=model, input=texts[0], encoding_format="float").data[0].embedding
    report.check("floats are asked for", all(isinstance(x, float) for x in floats))
    report.check("floats agree with the default base64", dot(floats, vectors[0]) > 0.999)
    encoded = client.embeddings.create(model=model, input=texts[0], encoding_format="base64").data[0].embedding
    is_text = isinstance(encoded, str)
    report.check("base64 holds 32-bit floats", is_text and len(base64.b64decode(encoded)) == 4 * DIMENSIONS)

    create = client.embeddings.create
    report.refused("a missing embedding model", 404, lambda: create(model="no-such-model", input="x"))
    report.refused("an empty list of inputs", 400, lambda: create(model=model, input=[]))


def test_files(report, client, resources):
    made = resources.file("α notes.txt", VOLCANO)
    size = len(VOLCANO.encode())
    report.check("a file id has its prefix", made.id.startswith("file-"), made.id)
    report.equal("a made file's fields", (made.object, made.bytes, made.filename), ("file", size, "α notes.txt"))
    report.equal("its purpose", made.purpose, "assistants")
    report.check("its status", made.status in ("uploaded", "processed"), made.status)
    report.check("its time", is_recent(made.created_at), made.created_at)
    found = client.files.retrieve(made.id)
    report.equal("it is retrieved", (found.id, found.bytes, found.filename), (made.id, size, "α notes.txt"))
    report.equal("its content is as uploaded", client.files.content(made.id).read(), VOLCANO.encode())

    data = bytes(range(256)) * 5000
    binary = resources.file("binary.bin", data, "application/octet-stream")
    report.equal("binary content is as uploaded", client.files.content(binary.id).read(), data)

    deleted = client.files.delete(made.id)
    report.equal("delete answers", (deleted.id, deleted.object, deleted.deleted), (made.id, "file", True))
    report.refused("a deleted file", 404, lambda: client.files.retrieve(made.id))
    report.refused("a deleted file's content", 404, lambda: client.files.content(made.id))
    report.refused("deleting it again", 404, lambda: client.files.delete(made.id))
    report.refused("a malformed file id", 404, lambda: client.files.retrieve("no-such-file"))
    create = client.files.create
    report.refused("an unknown purpose", 400, lambda: create(file=("a.txt", b"a"), purpose="nonsense"))


def test_file_list(report, client, resources):
    made = [resources.file(f"list-{n}.txt", f"text {n}").id for n in range(5)]
    first = client.files.list(limit=2)
    report.equal("a page obeys its limit", len(first.data), 2)
    report.equal("there is more", first.has_more, True)
    report.equal("first_id and last_id", (first.first_id, first.last_id), (first.data[0].id, first.data[-1].id))
    second = client.files.list(limit=2, after=first.data[-1].id)
    report.check("the next page is another", not set(ids(first.data)) & set(ids(second.data)))
    ascending = [id for id in ids(client.files.list(limit=2, order="asc")) if id in made]
    descending = [id for id in ids(client.files.list(limit=2, order="desc")) if id in made]
    report.equal("pages go through every file once", sorted(ascending), sorted(made))
    report.equal("desc is the reverse of asc", descending, ascending[::-1])
    everyone = ids(client.files.list(limit=10_000, purpose="assistants"))
    report.check("the purpose selects", set(made) <= set(everyone))
    other = ids(client.files.list(limit=10_000, purpose="batch"))
    report.check("another purpose does not", not set(made) & set(other))


def test_stores(report, client, resources):
    made = resources.store(metadata={"colour": "blue"})
    report.check("a store id has its prefix", made.id.startswith("vs_"), made.id)
    report.equal("a made store's object", made.object, "vector_store")
    report.check("its name", made.name.startswith("test-"), made.name)
    report.equal("its metadata", made.metadata, {"colour": "blue"})
    report.equal("an empty store is completed", made.status, "completed")
    counts = made.file_counts
    wanted = (0, 0, 0, 0, 0)
    report.equal(
        "it has no files", (counts.total, counts.completed, counts.failed, counts.cancelled, counts.in_progress), wanted
    )
    report.equal("it uses no bytes", made.usage_bytes, 0)
    report.check("its times", is_recent(made.created_at) and is_recent(made.last_active_at), repr(made))

    changed = client.vector_stores.update(made.id, name="renamed")
    report.equal("a changed name", changed.name, "renamed")
    report.equal("the metadata stays", changed.metadata, {"colour": "blue"})
    client.vector_stores.update(made.id, metadata={"shape": "round"})
    found = client.vector_stores.retrieve(made.id)
    report.equal("changes are kept", (found.id, found.name, found.metadata), (made.id, "renamed", {"shape": "round"}))

    deleted = client.vector_stores.delete(made.id)
    wanted = (made.id, "vector_store.deleted", True)
    report.equal("delete answers", (deleted.id, deleted.object, deleted.deleted), wanted)
    report.refused("a deleted store", 404, lambda: client.vector_stores.retrieve(made.id))
    report.refused("deleting it again", 404, lambda: client.vector_stores.delete(made.id))
    report.refused("searching it", 404, lambda: client.vector_stores.search(made.id, query="x"))


def test_store_list(report, client, resources):
    made = [resources.store().id for _ in range(5)]
    first = client.vector_stores.list(limit=2)
    report.equal("a page of stores obeys its limit", (len(first.data), first.has_more), (2, True))
    ascending = [id for id in ids(client.vector_stores.list(limit=2, order="asc")) if id in made]
    descending = [id for id in ids(client.vector_stores.list(limit=2, order="desc")) if id in made]
    report.equal("pages go through every store once", sorted(ascending), sorted(made))
    report.equal("stores: desc is the reverse of asc", descending, ascending[::-1])
    report.refused("a limit of 0", 400, lambda: client.vector_stores.list(limit=0))
    report.refused("a limit of 101", 400, lambda: client.vector_stores.list(limit=101))


def test_attached(report, client, library):
    for name, (content, _, attributes) in DOCUMENTS.items():
        attached = library.attached[name]
        report.equal(f"{name} is completed", (attached.status, attached.last_error), ("completed", None))
        report.equal(f"{name}: id", (attached.id, attached.vector_store_id), (library.files[name].id, library.store.id))
        report.equal(f"{name}: object", attached.object, "vector_store.file")
        report.equal(f"{name}: attributes", attached.attributes, attributes)
        report.check(f"{name}: bytes are used", attached.usage_bytes > 0, attached.usage_bytes)
        report.check(f"{name}: its time", is_recent(attached.created_at), attached.created_at)
        report.equal(f"{name}: chunking is told", attached.chunking_strategy.type, "static")

    store = client.vector_stores.retrieve(library.store.id)
    counts = (store.file_counts.completed, store.file_counts.in_progress, store.file_counts.total)
    report.equal("the store counts its files", counts, (5, 0, 5))
    report.equal("the store is completed", store.status, "completed")
    report.check("the store uses bytes", store.usage_bytes > 0, store.usage_bytes)


def test_attached_list(report, client, library):
    files = client.vector_stores.files
    store = library.store.id
    wanted = {file.id for file in library.files.values()}
    first = files.list(store, limit=2, order="asc")
    report.equal("a page of a store's files", (len(first.data), first.has_more), (2, True))
    report.equal("its first_id and last_id", (first.first_id, first.last_id), (first.data[0].id, first.data[1].id))
    ascending = ids(files.list(store, limit=2, order="asc"))
    report.equal("pages go through a store's files once", (len(ascending), set(ascending)), (5, wanted))
    report.equal("files: desc is the reverse of asc", ids(files.list(store, order="desc")), ascending[::-1])
    report.equal("the default order is desc", ids(files.list(store)), ascending[::-1])
    after = files.list(store, order="asc", after=ascending[2])
    report.equal("after", (ids(after.data), after.has_more), (ascending[3:], False))
    report.equal("before", ids(files.list(store, order="asc", before=ascending[2]).data), ascending[:2])
    report.equal("filter completed", set(ids(files.list(store, filter="completed"))), wanted)
    report.equal("filter failed", ids(files.list(store, filter="failed")), [])


def test_search(report, library):
    for question, name in QUESTIONS:
        page = library.search(question)
        top = page.data[0]
        report.equal(f"{question!r} finds {name}", top.filename, name)
        report.equal(f"{question!r} names the file", top.file_id, library.files[name].id)
        report.equal(f"{question!r} gives attributes", top.attributes, DOCUMENTS[name][2])

    question = QUESTIONS[0][0]
    page = library.search(question)
    report.equal("the page's object", page.object, "vector_store.search_results.page")
    report.check("the page repeats the query", question in page.search_query, repr(page.search_query))
    report.equal("the page is the last", (page.has_more, page.next_page), (False, None))
    scores = [hit.score for hit in page.data]
    report.check("scores fall", scores == sorted(scores, reverse=True), scores)
    report.check("scores are between 0 and 1", all(0 <= score <= 1 for score in scores), scores)
    top = page.data[0]
    report.check("hits have text", top.content[0].type == "text" and "lava" in top.content[0].text, repr(top.content))
    report.equal("max_num_results", len(library.search(question, max_num_results=2).data), 2)
    threshold = (scores[0] + scores[1]) / 2
    kept = library.search(question, ranking_options={"score_threshold": threshold}).data
    report.equal("score_threshold keeps the best", [hit.file_id for hit in kept], [top.file_id])
    several = library.search([question, "泡茶用多少度的水？"], max_num_results=4)
    found = {hit.filename for hit in several.data}
    report.check("several queries at once", {"volcano.txt", "绿茶.txt"} <= found, found)
    again = library.search(question, rewrite_query=False, ranking_options={"ranker": "auto"})
    report.equal("options are taken", again.data[0].file_id, top.file_id)


def compare(key, kind, value):
    return {"type": kind, "key": key, "value": value}


def every(*filters):
    return {"type": "and", "filters": list(filters)}


def some(*filters):
    return {"type": "or", "filters": list(filters)}


def test_search_filters(report, library):
    english = compare("language", "eq", "en")
    cases = [
        ("eq a string", english, {"volcano.txt", "bread.md", "bicycle.html"}),
        ("eq a boolean", compare("public", "eq", False), {"bicycle.html", "绿茶.txt"}),
        ("eq a number", compare("year", "eq", 2024), {"高铁.md"}),
        ("ne", compare("topic", "ne", "cooking"), {"volcano.txt", "bicycle.html", "高铁.md"}),
        ("gt", compare("year", "gt", 2021), {"bicycle.html", "高铁.md"}),
        ("gte", compare("year", "gte", 2021), {"bread.md", "bicycle.html", "高铁.md"}),
        ("lt", compare("year", "lt", 2020), {"volcano.txt"}),
        ("lte", compare("year", "lte", 2020), {"volcano.txt", "绿茶.txt"}),
        ("gt a fraction", compare("year", "gt", 2022.5), {"bicycle.html", "高铁.md"}),
        ("in", compare("topic", "in", ["geology", "repair", "none"]), {"volcano.txt", "bicycle.html"}),
        ("nin", compare("topic", "nin", ["geology", "repair"]), {"bread.md", "绿茶.txt", "高铁.md"}),
        ("in numbers", compare("year", "in", [2019, 2020]), {"volcano.txt", "绿茶.txt"}),
        ("and", every(english, compare("topic", "eq", "cooking")), {"bread.md"}),
        ("or", some(compare("topic", "eq", "repair"), compare("year", "eq", 2024)), {"bicycle.html", "高铁.md"}),
        (
            "or in and",
            every(english, some(compare("year", "lt", 2020), compare("public", "eq", False))),
            {"volcano.txt", "bicycle.html"},
        ),
        ("what matches nothing", compare("topic", "eq", "astronomy"), set()),
    ]
    for what, condition, wanted in cases:
        report.equal(f"filter {what}", library.names("How do I do it?", filters=condition, max_num_results=50), wanted)
    top = library.search("列车能开多快", filters=english).data[0]
    report.check("a filter outweighs likeness", top.filename != "高铁.md", top.filename)


def test_content(report, client, library):
    def text(name):
        page = client.vector_stores.files.content(library.files[name].id, vector_store_id=library.store.id)
        report.equal(f"{name}: the content page's object", page.object, "vector_store.file_content.page")
        report.check(f"{name}: the content is text", page.data and all(part.type == "text" for part in page.data))
        return "\n".join(part.text for part in page.data)

    report.check("a text file's content", "runny lava flow quietly" in text("volcano.txt"))
    report.check("a Chinese file's content", "龙井茶产于杭州西湖一带" in text("绿茶.txt"))
    bread = text("bread.md")
    report.check("a Markdown file's content", "Feed the starter" in bread and "Baking sourdough bread" in bread)
    page = text("bicycle.html")
    report.check("an HTML file's content", "patch the inner tube" in page and "sprockets & has" in page, page)
    hidden = [part for part in ("<p>", "hiddenScript", "hidden-style") if part in page]
    report.equal("an HTML file's markup is left out", hidden, [])


def test_attributes(report, client, resources):
    store = resources.store()
    file = resources.file("a.txt", VOLCANO)
    attached = resources.attach(store, file)
    report.check("attributes are empty unless given", not attached.attributes, repr(attached.attributes))
    files = client.vector_stores.files
    changed = files.update(file.id, vector_store_id=store.id, attributes={"kind": "new", "weight": 1.5})
    report.equal("update answers the attributes", changed.attributes, {"kind": "new", "weight": 1.5})
    found = files.retrieve(file.id, vector_store_id=store.id)
    report.equal("they are kept", found.attributes, {"kind": "new", "weight": 1.5})

    def found_by(condition):
        return hit_files(client.vector_stores.search(store.id, query="lava", filters=condition))

    report.equal("searches see them", found_by(compare("weight", "gt", 1)), {file.id})
    files.update(file.id, vector_store_id=store.id, attributes={"kind": "old"})
    report.equal("searches see a second change", found_by(compare("kind", "eq", "old")), {file.id})
    report.equal("and not what was before", found_by(compare("kind", "eq", "new")), set())

    again = resources.attach(store, file, attributes={"kind": "third"})
    report.equal(
        "attaching again replaces attributes", (again.status, again.attributes), ("completed", {"kind": "third"})
    )
    report.equal("and makes no second file", ids(files.list(store.id)), [file.id])
    hits = client.vector_stores.search(store.id, query="lava", max_num_results=50).data
    texts = [hit.content[0].text for hit in hits]
    report.equal("and no second copies of its text", len(texts), len(set(texts)))

    many = {f"key{n}": n for n in range(17)}
    report.refused("17 attributes", 400, lambda: files.update(file.id, vector_store_id=store.id, attributes=many))


def test_replace(report, client, resources):
    store = resources.store()
    old = resources.file("opening-hours.txt", "The museum opens at nine in the morning.")
    resources.attach(store, old)
    new = resources.file("opening-hours.txt", "The museum opens at eleven in the morning.")
    resources.attach(store, new)
    client.vector_stores.files.delete(old.id, vector_store_id=store.id)
    page = client.vector_stores.search(store.id, query="When does the museum open?")
    report.equal("only the new version is found", hit_files(page), {new.id})
    text = page.data[0].content[0].text
    report.check("and its text", "eleven" in text and "nine" not in text, text)


def test_delete_from_store(report, client, resources):
    store, other = resources.store(), resources.store()
    kept, gone = resources.file("kept.md", BREAD), resources.file("gone.txt", VOLCANO)
    for file in (kept, gone):
        resources.attach(store, file)
    resources.attach(other, gone)
    files = client.vector_stores.files

    def found(store):
        return hit_files(client.vector_stores.search(store.id, query="lava from a volcano"))

    report.equal("both files are found", found(store), {kept.id, gone.id})
    deleted = files.delete(gone.id, vector_store_id=store.id)
    wanted = (gone.id, "vector_store.file.deleted", True)
    report.equal("delete from a store answers", (deleted.id, deleted.object, deleted.deleted), wanted)
    report.equal("the deleted file is not found", found(store), {kept.id})
    report.equal("it is not listed", ids(files.list(store.id)), [kept.id])
    report.refused("it is not retrieved", 404, lambda: files.retrieve(gone.id, vector_store_id=store.id))
    report.refused("it is not deleted twice", 404, lambda: files.delete(gone.id, vector_store_id=store.id))
    report.equal("the store counts one file", client.vector_stores.retrieve(store.id).file_counts.total, 1)
    report.equal("the file itself is still there", client.files.retrieve(gone.id).id, gone.id)
    report.equal("another store still finds it", found(other), {gone.id})
    resources.attach(store, gone)
    report.equal("it is attached again", found(store), {kept.id, gone.id})

    client.files.delete(gone.id)
    report.check(
        "a deleted file leaves every store", is_eventually(lambda: found(store) == {kept.id} and not found(other))
    )


def test_chunking(report, client, resources):
    store = resources.store()
    paragraphs = [f"Paragraph {n}. The warehouse keeps crate number {n} on shelf {n % 7}." for n in range(150)]
    filler = "\n\n".join(paragraphs[:75] + ["The emperor penguin breeds in the Antarctic winter."] + paragraphs[75:])
    static = {"max_chunk_size_tokens": 100, "chunk_overlap_tokens": 20}
    file = resources.file("long.txt", filler)
    attached = resources.attach(store, file, chunking_strategy={"type": "static", "static": static})
    strategy = attached.chunking_strategy
    report.equal("a static strategy is told", (strategy.type, strategy.static.to_dict()), ("static", static))
    hits = client.vector_stores.search(store.id, query="Where do penguins have their young?", max_num_results=5).data
    report.equal("a long file has many chunks", len(hits), 5)
    text = hits[0].content[0].text
    report.check("the right chunk comes first", "penguin" in text, text)
    report.check("a chunk is a part of the file", len(text) < len(filler) / 5, len(text))
    other = resources.file("other.txt", VOLCANO)
    auto = resources.attach(store, other, chunking_strategy={"type": "auto"})
    report.equal("an auto strategy is resolved", auto.chunking_strategy.type, "static")
    wide = {"type": "static", "static": {"max_chunk_size_tokens": 100, "chunk_overlap_tokens": 90}}
    report.refused(
        "an overlap of more than half",
        400,
        lambda: client.vector_stores.files.create(store.id, file_id=other.id, chunking_strategy=wide),
    )


def test_failed_file(report, client, resources):
    store = resources.store()
    broken = resources.file("broken.pdf", b"%PDF-1.7\nthis is not a document at all", "application/pdf")
    attached = resources.attach(store, broken)
    report.equal("a broken PDF fails", attached.status, "failed")
    codes = ("server_error", "unsupported_file", "invalid_file")
    error = attached.last_error
    report.check("the reason is told", error is not None and error.code in codes and error.message, repr(error))
    report.equal("it is counted as failed", client.vector_stores.retrieve(store.id).file_counts.failed, 1)
    failed = client.vector_stores.files.list(store.id, filter="failed")
    report.equal("it is listed as failed", ids(failed), [broken.id])
    report.equal("nothing of it is found", client.vector_stores.search(store.id, query="document").data, [])


def test_upload_and_poll(report, client, resources):
    store = resources.store()
    attached = client.vector_stores.files.upload_and_poll(
        vector_store_id=store.id, file=("poll.md", BREAD.encode()), attributes={"n": 1}
    )
    resources.files.append(attached.id)
    report.equal("upload_and_poll completes", (attached.status, attached.attributes), ("completed", {"n": 1}))
    page = client.vector_stores.search(store.id, query="crisp crust")
    report.equal("what was uploaded is found", page.data[0].filename, "poll.md")


def test_store_with_files(report, client, resources):
    file = resources.file("first.txt", VOLCANO)
    store = resources.store(file_ids=[file.id])

    def completed():
        return client.vector_stores.retrieve(store.id).file_counts.completed

    report.check("a store made with files has them", is_eventually(lambda: completed() == 1), completed())
    page = client.vector_stores.search(store.id, query="lava")
    report.equal("and finds them", hit_files(page), {file.id})


def test_refusals(report, client, resources):
    stores = client.vector_stores
    store = resources.store()
    file = resources.file("a.txt", "text")
    refused = report.refused
    refused("a missing store", 404, lambda: stores.retrieve(MISSING_STORE))
    refused("a malformed store id", 404, lambda: stores.retrieve("no-such-store"))
    refused("changing a missing store", 404, lambda: stores.update(MISSING_STORE, name="x"))
    refused("attaching to a missing store", 404, lambda: stores.files.create(MISSING_STORE, file_id=file.id))
    refused("attaching a missing file", 404, lambda: stores.files.create(store.id, file_id=MISSING_FILE))
    refused("attaching a malformed file id", 404, lambda: stores.files.create(store.id, file_id="no-such-file"))
    refused("a file that is not attached", 404, lambda: stores.files.retrieve(file.id, vector_store_id=store.id))
    refused("its content", 404, lambda: stores.files.content(file.id, vector_store_id=store.id))
    refused("a file list of a missing store", 404, lambda: stores.files.list(MISSING_STORE))
    refused("a missing store's batch", 404, lambda: stores.file_batches.create(MISSING_STORE, file_ids=[file.id]))

    def search(**options):
        return lambda: stores.search(store.id, query="x", **options)

    refused("max_num_results of 0", 400, search(max_num_results=0))
    refused("max_num_results of 51", 400, search(max_num_results=51))
    refused("an unknown kind of filter", 400, search(filters={"type": "like", "key": "a", "value": "b"}))
    refused("a filter without a key", 400, search(filters={"type": "eq", "value": "b"}))
    refused("a filter that is no object", 400, search(filters=["a"]))
    refused("a query that is no text", 400, lambda: stores.search(store.id, query=5))
    metadata = {f"key{n}": "x" for n in range(17)}
    refused("17 metadata keys", 400, lambda: stores.update(store.id, metadata=metadata))


def test_wrong_key(report, base_url):
    client = connect(base_url, "wrong")
    report.refused("a wrong key is refused", 401, client.models.list)


def connect(base_url, api_key):
    return OpenAI(base_url=f"{base_url}/v1", api_key=api_key, timeout=120, max_retries=0)


def run(report, client, resources):
    for test in (test_models, test_embeddings):
        report.section(test, client)
    for test in (test_files, test_file_list, test_stores, test_store_list):
        report.section(test, client, resources)
    report.section(test_library, client, resources)
    for test in (
        test_attributes,
        test_replace,
        test_delete_from_store,
        test_chunking,
        test_failed_file,
        test_upload_and_poll,
        test_store_with_files,
        test_refusals,
    ):
        report.section(test, client, resources)


def test_library(report, client, resources):
    library = Library(client, resources)
    for test in (test_attached, test_attached_list, test_content):
        report.section(test, client, library)
    for test in (test_search, test_search_filters):
        report.section(test, library)


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    base_url = sys.argv[1].rstrip("/")
    api_key = sys.argv[2] if len(sys.argv) == 3 else None
    report = Report()
    client = connect(base_url, api_key or "unused")
    resources = Resources(client)
    try:
        run(report, client, resources)
        if api_key:
            report.section(test_wrong_key, base_url)
    finally:
        resources.delete_all()
    print(f"{report.passed} passed, {report.failed} failed")
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    main()
