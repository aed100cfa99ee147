"""Checks a running Shoal through the unmodified `qdrant-client` package, over REST.

    python test_qdrant.py BASE_URL [API_KEY]

Every collection made here has a unique name and is deleted at the end, whatever happens. One
line is printed per check; the exit code is 1 when any of them failed.
"""

import importlib.metadata
import sys
import time
import traceback
import uuid
import warnings

import numpy as np
from qdrant_client import QdrantClient, models
from qdrant_client.common.version_check import is_compatible
from qdrant_client.http.exceptions import UnexpectedResponse

UUID = "550e8400-e29b-41d4-a716-446655440000"
EVENTUALLY_SECONDS = 20

CITIES = [
    models.PointStruct(
        id=1,
        vector=[1.0, 0.0, 0.0, 0.0],
        payload={
            "city": "Berlin",
            "population": 3_600_000,
            "price": 1.5,
            "open": True,
            "tags": ["big", "green"],
            "rooms": [{"size": 3, "sun": True}, {"size": 9, "sun": False}],
            "where": {"country": "DE", "zone": {"name": "CET"}},
        },
    ),
    models.PointStruct(
        id=2,
        vector=[0.9, 0.1, 0.0, 0.0],
        payload={
            "city": "Bonn",
            "population": 330_000,
            "price": 2.5,
            "open": False,
            "tags": ["green"],
            "rooms": [{"size": 9, "sun": True}],
            "where": {"country": "DE", "zone": {"name": "CET"}},
        },
    ),
    models.PointStruct(
        id=3,
        vector=[0.0, 3.0, 4.0, 0.0],
        payload={
            "city": "上海",
            "population": 24_000_000,
            "price": 3.5,
            "open": True,
            "tags": [],
            "note": None,
            "where": {"country": "CN", "zone": {"name": "CST"}},
        },
    ),
    models.PointStruct(id=4, vector=[0.0, 1.0, 0.0, 0.0], payload={"city": "New York", "population": 8_300_000}),
    models.PointStruct(id=5, vector=[0.0, 0.0, 0.0, 2.0], payload={}),
    models.PointStruct(id=UUID, vector=[-1.0, 0.0, 0.0, 0.0], payload={"city": "Łódź", "open": False}),
]
ALL_IDS = [point.id for point in CITIES]


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

    def near(self, what, got, wanted):
        holds = got is not None and np.shape(got) == np.shape(wanted) and np.allclose(got, wanted, atol=1e-4)
        self.check(what, holds, f"got {got!r}, wanted {wanted!r}")

    def refused(self, what, statuses, call):
        """The call must be refused with one of the statuses, in Qdrant's error envelope."""
        try:
            answer = call()
        except UnexpectedResponse as error:
            self.check(what, error.status_code in statuses, str(error))
            message = error.structured().get("status", {}).get("error")
            self.check(f"{what}: the error has a message", isinstance(message, str) and message, repr(message))
        else:
            self.check(what, False, f"not refused: {answer!r}")

    def section(self, test, *args):
        try:
            test(self, *args)
        except Exception:
            self.check(f"{test.__name__} runs to its end", False, traceback.format_exc())


class Collections:
    """Makes collections with unique names and deletes them in the end."""

    def __init__(self, client):
        self.client = client
        self.names = []

    def name(self, label):
        self.names.append(f"{label}_{uuid.uuid4().hex[:12]}")
        return self.names[-1]

    def create(self, label, vectors):
        name = self.name(label)
        self.client.create_collection(name, vectors_config=vectors)
        return name

    def cities(self, label):
        name = self.create(label, cosine(4))
        self.client.upsert(name, CITIES)
        return name

    def delete_all(self):
        for name in self.names:
            if self.client.collection_exists(name):
                self.client.delete_collection(name)


def cosine(size):
    return models.VectorParams(size=size, distance=models.Distance.COSINE)


def unit(vector):
    return np.array(vector) / np.linalg.norm(vector)


def ids(points):
    return [point.id for point in points]


def is_eventually(predicate):
    deadline = time.monotonic() + EVENTUALLY_SECONDS
    while time.monotonic() < deadline:
        if predicate():
            return True
        time.sleep(0.1)
    return False


def field(key, **condition):
    return models.FieldCondition(key=key, **condition)


def equals(key, value):
    return field(key, match=models.MatchValue(value=value))


def test_service(report, client):
    info = client.info()
    report.check("the root has a title", bool(info.title))
    version = importlib.metadata.version("qdrant-client")
    report.check(
        "the client finds the server's version compatible",
        is_compatible(version, info.version),
        f"client {version}, server {info.version}",
    )


def test_cluster(report, client, collections):
    status = client.cluster_status()
    report.equal("the cluster is enabled", status.status, "enabled")
    report.check("the answering peer is one of them", str(status.peer_id) in status.peers, status)
    report.check("it has a leader", status.raft_info.leader is not None, status)
    name = collections.cities("where")
    where = client.collection_cluster_info(name)
    report.equal("its shards are counted", where.shard_count, len(where.local_shards) + len(where.remote_shards))
    held = sum(shard.points_count for shard in where.local_shards)
    report.equal("its points are counted", held, client.count(name, exact=True).count)
    report.check("its replicas are active", all(shard.state == "Active" for shard in where.local_shards), where)
    report.equal("nothing is under way", where.shard_transfers, [])


def test_collections(report, client, collections):
    name = collections.name("life")
    report.equal("an unmade collection does not exist", client.collection_exists(name), False)
    report.equal("create_collection answers true", client.create_collection(name, vectors_config=cosine(4)), True)
    report.equal("the collection exists", client.collection_exists(name), True)
    report.check("it is listed", name in [found.name for found in client.get_collections().collections])

    info = client.get_collection(name)
    report.equal("its status is green", info.status, models.CollectionStatus.GREEN)
    report.equal("its optimizer is ok", info.optimizer_status, models.OptimizersStatusOneOf.OK)
    report.equal("it has no points", info.points_count, 0)
    report.equal("its vectors' size", info.config.params.vectors.size, 4)
    report.equal("its vectors' distance", info.config.params.vectors.distance, models.Distance.COSINE)
    report.equal("it has no payload indexes", info.payload_schema, {})
    report.check("it tells its graph's parameters", info.config.hnsw_config.m > 0)

    client.upsert(name, CITIES)
    report.check(
        "it counts its points",
        is_eventually(lambda: client.get_collection(name).points_count == len(CITIES)),
        repr(client.get_collection(name).points_count),
    )
    report.refused("a duplicate is refused", [409], lambda: client.create_collection(name, vectors_config=cosine(4)))
    report.equal("the refused duplicate leaves the points", client.count(name).count, len(CITIES))

    report.equal("delete_collection answers true", client.delete_collection(name), True)
    report.equal("the deleted collection does not exist", client.collection_exists(name), False)
    report.equal("deleting it again answers false", client.delete_collection(name), False)
    client.create_collection(name, vectors_config=cosine(2))
    report.equal("a collection made again is empty", client.count(name).count, 0)
    report.equal("and has its new size", client.get_collection(name).config.params.vectors.size, 2)


def test_missing_collection(report, client, collections):
    name = collections.name("missing")
    calls = {
        "get_collection": lambda: client.get_collection(name),
        "upsert": lambda: client.upsert(name, CITIES),
        "retrieve": lambda: client.retrieve(name, [1]),
        "scroll": lambda: client.scroll(name),
        "count": lambda: client.count(name),
        "query_points": lambda: client.query_points(name, query=[1.0, 0.0, 0.0, 0.0]),
        "delete": lambda: client.delete(name, [1]),
        "set_payload": lambda: client.set_payload(name, {"a": 1}, points=[1]),
        "create_payload_index": lambda: client.create_payload_index(name, "a", models.PayloadSchemaType.KEYWORD),
    }
    for what, call in calls.items():
        report.refused(f"{what} on a missing collection", [404], call)


def test_bad_requests(report, client, collections):
    name = collections.cities("bad")
    short = models.PointStruct(id=7, vector=[1.0, 2.0])
    report.refused("an upsert of a wrong dimension", [400], lambda: client.upsert(name, [short]))
    report.refused("a half wrong upsert", [400], lambda: client.upsert(name, [CITIES[0], short]))
    report.equal("the refused point is not there", client.retrieve(name, [7]), [])
    report.refused("a query of a wrong dimension", [400], lambda: client.query_points(name, query=[1.0, 2.0]))
    named = models.PointStruct(id=7, vector={"nope": [1.0, 0.0, 0.0, 0.0]})
    report.refused("an upsert of an unknown vector name", [400], lambda: client.upsert(name, [named]))
    report.refused(
        "a query of an unknown vector name",
        [400],
        lambda: client.query_points(name, query=[1.0, 0.0, 0.0, 0.0], using="nope"),
    )
    report.refused("a query by a missing point", [404], lambda: client.query_points(name, query=12345))
    empty = models.VectorParams(size=0, distance=models.Distance.DOT)
    refused = collections.name("zero")
    report.refused(
        "vectors of no dimension", [400, 422], lambda: client.create_collection(refused, vectors_config=empty)
    )
    text = models.PointStruct(id="not-a-uuid", vector=[1.0, 0.0, 0.0, 0.0])
    report.refused("a point id that is no UUID", [400], lambda: client.upsert(name, [text]))


def test_points(report, client, collections):
    name = collections.create("points", cosine(4))
    done = client.upsert(name, CITIES)
    report.equal("an upsert is completed", done.status, models.UpdateStatus.COMPLETED)
    report.check("an upsert has an operation id", isinstance(done.operation_id, int), repr(done))
    report.equal("count counts", client.count(name).count, len(CITIES))

    found = {point.id: point for point in client.retrieve(name, ALL_IDS, with_vectors=True)}
    report.equal("every point is retrieved", set(found), set(ALL_IDS))
    for city in CITIES:
        report.equal(f"the payload of {city.id} reads back", found[city.id].payload, city.payload)
        report.near(f"the vector of {city.id} reads back, normalised", found[city.id].vector, unit(city.vector))

    report.equal("missing points are left out", ids(client.retrieve(name, [1, 999])), [1])
    (plain,) = client.retrieve(name, [1])
    report.equal("vectors are left out unless asked for", plain.vector, None)
    (bare,) = client.retrieve(name, [1], with_payload=False)
    report.check("a payload is left out when refused", not bare.payload, repr(bare.payload))
    (some,) = client.retrieve(name, [1], with_payload=["city", "where.country"])
    report.equal("chosen payload keys", some.payload, {"city": "Berlin", "where": {"country": "DE"}})

    client.upsert(name, [models.PointStruct(id=1, vector=[0.0, 0.0, 1.0, 0.0], payload={"new": "值"})])
    (replaced,) = client.retrieve(name, [1], with_vectors=True)
    report.equal("an upsert replaces the payload wholly", replaced.payload, {"new": "值"})
    report.near("an upsert replaces the vector", replaced.vector, [0.0, 0.0, 1.0, 0.0])
    report.equal("a replaced point is still one", client.count(name).count, len(CITIES))

    other = str(uuid.uuid4())
    client.upsert(
        name,
        models.Batch(ids=[10, other], vectors=[[1, 2, 3, 4], [4, 3, 2, 1]], payloads=[{"n": 1}, {"n": 2}]),
    )
    batch = {point.id: point.payload for point in client.retrieve(name, [10, other])}
    report.equal("the batch form upserts", batch, {10: {"n": 1}, other: {"n": 2}})


def test_eventual_writes(report, client, collections):
    name = collections.create("eventual", cosine(2))
    point = models.PointStruct(id=1, vector=[1.0, 0.0])
    done = client.upsert(name, [point], wait=False)
    statuses = [models.UpdateStatus.ACKNOWLEDGED, models.UpdateStatus.COMPLETED]
    report.check("an upsert without waiting is acknowledged", done.status in statuses, repr(done))
    report.check("it appears", is_eventually(lambda: client.count(name).count == 1))
    many = [models.PointStruct(id=index, vector=[1.0, float(index)]) for index in range(2, 302)]
    client.upload_points(name, many, batch_size=64)
    report.check("upload_points uploads", is_eventually(lambda: client.count(name).count == 301))


def filter_cases():
    big = field("population", range=models.Range(gte=3_600_000))
    room = [field("size", range=models.Range(gt=5)), equals("sun", True)]
    match_any = models.MatchAny(any=["Bonn", "上海", "Rome"])
    match_except = models.MatchExcept(**{"except": ["Bonn", "上海"]})
    payload_field = models.PayloadField
    return [
        ("no conditions", models.Filter(), ALL_IDS),
        ("must match a string", models.Filter(must=[equals("city", "Berlin")]), [1]),
        ("must match a Chinese string", models.Filter(must=[equals("city", "上海")]), [3]),
        ("must match an integer", models.Filter(must=[equals("population", 330_000)]), [2]),
        ("must match a boolean", models.Filter(must=[equals("open", False)]), [2, UUID]),
        ("must match inside an array", models.Filter(must=[equals("tags", "green")]), [1, 2]),
        ("must match a nested path", models.Filter(must=[equals("where.zone.name", "CET")]), [1, 2]),
        ("must match in an array of objects", models.Filter(must=[equals("rooms[].size", 3)]), [1]),
        ("must match nothing", models.Filter(must=[equals("city", "Rome")]), []),
        ("a single condition", models.Filter(must=equals("city", "Bonn")), [2]),
        ("two musts", models.Filter(must=[equals("open", True), big]), [1, 3]),
        ("should", models.Filter(should=[equals("city", "Bonn"), equals("city", "Łódź")]), [2, UUID]),
        ("must and should", models.Filter(must=[big], should=[equals("open", True), equals("city", "Bonn")]), [1, 3]),
        ("must_not", models.Filter(must_not=[equals("open", True)]), [2, 4, 5, UUID]),
        ("must, not", models.Filter(must=[big], must_not=[equals("city", "Berlin")]), [3, 4]),
        ("a filter in a filter", models.Filter(must=[models.Filter(must_not=[big]), equals("open", False)]), [2, UUID]),
        ("any", models.Filter(must=[field("city", match=match_any)]), [2, 3]),
        ("except", models.Filter(must=[field("city", match=match_except)]), [1, 4, UUID]),
        ("gt and lt", models.Filter(must=[field("population", range=models.Range(gt=330_000, lt=24_000_000))]), [1, 4]),
        ("gte and lte", models.Filter(must=[field("price", range=models.Range(gte=1.5, lte=2.5))]), [1, 2]),
        ("an empty range", models.Filter(must=[field("price", range=models.Range(gt=3.5))]), []),
        ("has_id", models.Filter(must=[models.HasIdCondition(has_id=[1, 4, 999, UUID])]), [1, 4, UUID]),
        ("not has_id", models.Filter(must_not=[models.HasIdCondition(has_id=[1, UUID])]), [2, 3, 4, 5]),
        (
            "is_empty",
            models.Filter(must=[models.IsEmptyCondition(is_empty=payload_field(key="tags"))]),
            [3, 4, 5, UUID],
        ),
        ("not is_empty", models.Filter(must_not=[models.IsEmptyCondition(is_empty=payload_field(key="tags"))]), [1, 2]),
        ("is_null", models.Filter(must=[models.IsNullCondition(is_null=payload_field(key="note"))]), [3]),
        ("values_count", models.Filter(must=[field("tags", values_count=models.ValuesCount(gte=2))]), [1]),
        (
            "nested",
            models.Filter(
                must=[models.NestedCondition(nested=models.Nested(key="rooms", filter=models.Filter(must=room)))]
            ),
            [2],
        ),
        (
            "nested, negated inside",
            models.Filter(
                must=[
                    models.NestedCondition(
                        nested=models.Nested(
                            key="rooms", filter=models.Filter(must=[room[0]], must_not=[equals("sun", True)])
                        )
                    )
                ]
            ),
            [1],
        ),
    ]


def check_filters(report, client, name, label):
    for what, condition, wanted in filter_cases():
        found, _ = client.scroll(name, scroll_filter=condition, limit=100)
        report.equal(f"{label}, {what}: scroll", sorted(ids(found), key=str), sorted(wanted, key=str))
        report.equal(f"{label}, {what}: count", client.count(name, count_filter=condition).count, len(wanted))
        hits = client.query_points(name, query=[1.0, 1.0, 1.0, 1.0], query_filter=condition, limit=100).points
        report.equal(f"{label}, {what}: query", sorted(ids(hits), key=str), sorted(wanted, key=str))


def test_filters(report, client, collections):
    check_filters(report, client, collections.cities("filters"), "filter")


def test_payload_index(report, client, collections):
    name = collections.cities("index")
    kinds = {
        "city": models.PayloadSchemaType.KEYWORD,
        "tags": models.PayloadSchemaType.KEYWORD,
        "population": models.PayloadSchemaType.INTEGER,
        "price": models.PayloadSchemaType.FLOAT,
        "open": models.PayloadSchemaType.BOOL,
        "where.zone.name": models.PayloadSchemaType.KEYWORD,
    }
    for key, kind in kinds.items():
        done = client.create_payload_index(name, key, kind)
        report.equal(f"the index of {key} is completed", done.status, models.UpdateStatus.COMPLETED)
    schema = client.get_collection(name).payload_schema
    report.equal("the schema tells every index", {key: info.data_type for key, info in schema.items()}, kinds)
    check_filters(report, client, name, "index")

    client.upsert(name, [models.PointStruct(id=6, vector=[1.0, 1.0, 0.0, 0.0], payload={"city": "Berlin"})])
    in_berlin = models.Filter(must=[equals("city", "Berlin")])
    report.equal("a later point is indexed", client.count(name, count_filter=in_berlin).count, 2)
    client.delete(name, [1])
    report.equal("a deleted point leaves the index", client.count(name, count_filter=in_berlin).count, 1)

    client.delete_payload_index(name, "city")
    report.check("a dropped index leaves the schema", "city" not in client.get_collection(name).payload_schema)
    report.equal("filters work without it", client.count(name, count_filter=in_berlin).count, 1)


def test_scroll(report, client, collections):
    name = collections.cities("scroll")
    pages, offset = [], None
    while True:
        points, offset = client.scroll(name, limit=2, offset=offset)
        pages.append(ids(points))
        if offset is None:
            break
    report.equal("pages go through every point in order", pages, [[1, 2], [3, 4], [5, UUID]])
    points, offset = client.scroll(name, limit=100)
    report.equal("one page holds all", (ids(points), offset), (ALL_IDS, None))
    report.equal("a scroll gives payloads", points[0].payload, CITIES[0].payload)
    report.equal("a scroll gives no vectors", points[0].vector, None)
    points, offset = client.scroll(name, limit=1, offset=3, with_payload=["city"], with_vectors=True)
    report.equal("an offset is included", (ids(points), offset), ([3], 4))
    report.equal("a scroll selects payload", points[0].payload, {"city": "上海"})
    report.near("a scroll gives vectors when asked", points[0].vector, [0.0, 0.6, 0.8, 0.0])
    closed = models.Filter(must_not=[equals("open", True)])
    first, offset = client.scroll(name, scroll_filter=closed, limit=3)
    rest, end = client.scroll(name, scroll_filter=closed, limit=3, offset=offset)
    report.equal("filtered pages", (ids(first), ids(rest), end), ([2, 4, 5], [UUID], None))


def test_query(report, client, collections):
    name = collections.cities("query")
    query = [1.0, 0.2, 0.1, 0.0]
    similar = {city.id: float(unit(city.vector) @ unit(query)) for city in CITIES}
    order = sorted(similar, key=similar.get, reverse=True)

    hits = client.query_points(name, query=query).points
    report.equal("a query ranks by similarity", ids(hits), order)
    report.near("scores are cosines", [hit.score for hit in hits], [similar[id] for id in order])
    report.check("hits have a version", all(isinstance(hit.version, int) for hit in hits))
    report.equal("hits have payloads", hits[0].payload, next(c.payload for c in CITIES if c.id == order[0]))
    report.equal("hits have no vectors unless asked", hits[0].vector, None)

    report.equal("limit", ids(client.query_points(name, query=query, limit=2).points), order[:2])
    report.equal("offset", ids(client.query_points(name, query=query, limit=2, offset=1).points), order[1:3])
    report.equal("an offset past the end", client.query_points(name, query=query, offset=100).points, [])
    threshold = (similar[order[1]] + similar[order[2]]) / 2
    kept = client.query_points(name, query=query, score_threshold=threshold).points
    report.equal("score_threshold", ids(kept), order[:2])
    exact = models.SearchParams(exact=True, hnsw_ef=64)
    report.equal("exact search", ids(client.query_points(name, query=query, search_params=exact).points), order)
    nearest = models.NearestQuery(nearest=query)
    report.equal("a nearest object", ids(client.query_points(name, query=nearest).points), order)
    report.equal("a numpy query", ids(client.query_points(name, query=np.array(query)).points), order)

    only = models.Filter(must=[equals("open", True)])
    hits = client.query_points(name, query=query, query_filter=only).points
    report.equal("a filtered query", ids(hits), [id for id in order if id in (1, 3)])

    by_id = client.query_points(name, query=1, limit=1).points
    report.equal("a query by id leaves that point out", ids(by_id), [2])
    by_uuid = client.query_points(name, query=UUID).points
    report.equal("a query by UUID leaves that point out", set(ids(by_uuid)), set(ALL_IDS) - {UUID})
    batch = client.query_batch_points(
        name, [models.QueryRequest(query=query, limit=1), models.QueryRequest(query=[0.0, 0.0, 0.0, 1.0], limit=1)]
    )
    report.equal("a batch of queries", [ids(answer.points) for answer in batch], [[order[0]], [5]])


def test_query_selectors(report, client, collections):
    name = collections.cities("select")

    def top(**options):
        return client.query_points(name, query=[1.0, 0.0, 0.0, 0.0], limit=1, **options).points[0]

    report.near("a vector is given when asked", top(with_vectors=True).vector, [1.0, 0.0, 0.0, 0.0])
    report.check("no payload", not top(with_payload=False).payload)
    report.equal("a list of keys", top(with_payload=["city"]).payload, {"city": "Berlin"})
    include = models.PayloadSelectorInclude(include=["price", "where.zone.name"])
    wanted = {"price": 1.5, "where": {"zone": {"name": "CET"}}}
    report.equal("include", top(with_payload=include).payload, wanted)
    exclude = models.PayloadSelectorExclude(exclude=["rooms", "tags", "where", "price"])
    report.equal(
        "exclude", top(with_payload=exclude).payload, {"city": "Berlin", "population": 3_600_000, "open": True}
    )


def test_fusion(report, client, collections):
    name = collections.cities("fusion")
    left = models.Prefetch(query=[1.0, 0.05, 0.0, 0.0], limit=2)
    right = models.Prefetch(query=[0.9, 0.3, 0.0, 0.0], limit=3)
    rrf = models.FusionQuery(fusion=models.Fusion.RRF)
    hits = client.query_points(name, query=rrf, prefetch=[left, right]).points
    report.equal("fusion joins its prefetches", {hit.id for hit in hits}, {1, 2, 4})
    report.equal("what is in one prefetch only comes last", hits[-1].id, 4)
    report.check("fused scores fall", [h.score for h in hits] == sorted((h.score for h in hits), reverse=True))
    report.equal("fused hits have payloads", hits[-1].payload, CITIES[3].payload)
    report.equal(
        "fusion obeys the limit", len(client.query_points(name, query=rrf, prefetch=[left, right], limit=1).points), 1
    )
    filtered = models.Prefetch(query=[1.0, 0.0, 0.0, 0.0], filter=models.Filter(must=[equals("city", "上海")]))
    hits = client.query_points(name, query=rrf, prefetch=[filtered]).points
    report.equal("a prefetch obeys its filter", ids(hits), [3])


def test_named_vectors(report, client, collections):
    vectors = {"title": cosine(3), "body": models.VectorParams(size=2, distance=models.Distance.DOT)}
    name = collections.create("named", vectors)
    params = client.get_collection(name).config.params.vectors
    wanted = {"title": (3, models.Distance.COSINE), "body": (2, models.Distance.DOT)}
    report.equal("the schema of named vectors", {k: (v.size, v.distance) for k, v in params.items()}, wanted)
    client.upsert(
        name,
        [
            models.PointStruct(id=1, vector={"title": [1.0, 0.0, 0.0], "body": [5.0, 1.0]}, payload={"n": 1}),
            models.PointStruct(id=2, vector={"title": [0.0, 1.0, 0.0], "body": [7.0, 1.0]}, payload={"n": 2}),
            models.PointStruct(id=3, vector={"title": [0.9, 0.1, 0.0]}, payload={"n": 3}),
        ],
    )
    titles = client.query_points(name, query=[1.0, 0.0, 0.0], using="title").points
    report.equal("a query of one name", ids(titles), [1, 3, 2])
    bodies = client.query_points(name, query=[1.0, 0.0], using="body").points
    report.equal("points without that vector are not found", ids(bodies), [2, 1])
    report.near("scores are inner products", [hit.score for hit in bodies], [7.0, 5.0])
    (chosen,) = client.retrieve(name, [1], with_vectors=["body"])
    report.equal("one vector is chosen", list(chosen.vector), ["body"])
    report.near("it reads back as written", chosen.vector["body"], [5.0, 1.0])
    (partial,) = client.retrieve(name, [3], with_vectors=True)
    report.equal("only the given vectors exist", list(partial.vector), ["title"])
    hit = client.query_points(name, query=[1.0, 0.0], using="body", with_vectors=["title"], limit=1).points[0]
    report.near("a hit gives another vector", hit.vector["title"], [0.0, 1.0, 0.0])
    report.equal("a query by id of one name", ids(client.query_points(name, query=1, using="title").points), [3, 2])
    report.refused("a wrong dimension by name", [400], lambda: client.query_points(name, query=[1.0], using="body"))
    report.refused("a name is needed", [400], lambda: client.query_points(name, query=[1.0, 0.0]))


def test_distances(report, client, collections):
    points = {1: [1.0, 1.0], 2: [4.0, 5.0], 3: [-2.0, 0.0]}
    cases = [
        (models.Distance.DOT, [2, 1, 3], [9.0, 2.0, -2.0], 0.0, [2, 1]),
        (models.Distance.EUCLID, [1, 3, 2], [0.0, 10.0**0.5, 5.0], 4.0, [1, 3]),
        (models.Distance.MANHATTAN, [1, 3, 2], [0.0, 4.0, 7.0], 5.0, [1, 3]),
    ]
    for distance, order, scores, threshold, kept in cases:
        label = distance.value
        name = collections.create(label.lower(), models.VectorParams(size=2, distance=distance))
        report.equal(f"{label} is told", client.get_collection(name).config.params.vectors.distance, distance)
        client.upsert(name, [models.PointStruct(id=id, vector=vector) for id, vector in points.items()])
        hits = client.query_points(name, query=[1.0, 1.0]).points
        report.equal(f"{label} ranks", ids(hits), order)
        report.near(f"{label} scores", [hit.score for hit in hits], scores)
        hits = client.query_points(name, query=[1.0, 1.0], score_threshold=threshold).points
        report.equal(f"{label} obeys a threshold", ids(hits), kept)
        (point,) = client.retrieve(name, [2], with_vectors=True)
        report.near(f"{label} keeps vectors as written", point.vector, points[2])


def test_payload_changes(report, client, collections):
    name = collections.create("payload", cosine(2))
    client.upsert(
        name,
        [
            models.PointStruct(id=id, vector=[1.0, float(id)], payload={"a": id, "b": {"c": 1, "d": 2}})
            for id in (1, 2, 3)
        ],
    )

    def payload(id):
        return client.retrieve(name, [id])[0].payload

    done = client.set_payload(name, {"x": "y", "b": 7}, points=[1])
    report.equal("set_payload is completed", done.status, models.UpdateStatus.COMPLETED)
    report.equal("set_payload merges keys", payload(1), {"a": 1, "b": 7, "x": "y"})
    report.equal("other points keep theirs", payload(2), {"a": 2, "b": {"c": 1, "d": 2}})
    high = models.Filter(must=[field("a", range=models.Range(gte=2))])
    client.set_payload(name, {"high": True}, points=high)
    report.equal("set_payload by filter", [payload(id).get("high") for id in (1, 2, 3)], [None, True, True])
    client.overwrite_payload(name, {"only": [1, 2]}, points=[2])
    report.equal("overwrite_payload replaces", payload(2), {"only": [1, 2]})
    client.delete_payload(name, ["x", "b"], points=[1])
    report.equal("delete_payload removes keys", payload(1), {"a": 1})
    client.clear_payload(name, [3])
    report.equal("clear_payload empties", payload(3), {})
    (point,) = client.retrieve(name, [3], with_vectors=True)
    report.near("vectors survive", point.vector, unit([1.0, 3.0]))
    report.equal("filters see the changes", client.count(name, count_filter=high).count, 0)


def test_delete(report, client, collections):
    name = collections.cities("delete")
    done = client.delete(name, [1, 999])
    report.equal("delete is completed", done.status, models.UpdateStatus.COMPLETED)
    report.equal("a deleted point is gone", client.retrieve(name, [1]), [])
    hits = client.query_points(name, query=[1.0, 0.0, 0.0, 0.0]).points
    report.check("a query does not find it", 1 not in ids(hits), repr(ids(hits)))
    client.delete(name, models.Filter(must=[equals("open", False)]))
    report.equal("delete by filter", ids(client.scroll(name)[0]), [3, 4, 5])
    client.delete(name, models.PointIdsList(points=[3]))
    report.equal("count after deletes", client.count(name).count, 2)
    client.upsert(name, [CITIES[0]])
    hits = client.query_points(name, query=[1.0, 0.0, 0.0, 0.0], limit=1).points
    report.equal("a point comes back", ids(hits), [1])
    client.delete(name, models.FilterSelector(filter=models.Filter()))
    report.equal("an empty filter deletes all", client.count(name).count, 0)


def test_aliases(report, client, collections):
    name = collections.cities("aliased")
    other = collections.create("other", cosine(4))
    alias = f"alias_{uuid.uuid4().hex[:12]}"
    renamed = f"{alias}_renamed"

    def targets():
        return {found.alias_name: found.collection_name for found in client.get_aliases().aliases}

    def point_at(collection):
        action = models.CreateAlias(collection_name=collection, alias_name=alias)
        return client.update_collection_aliases([models.CreateAliasOperation(create_alias=action)])

    report.equal("an alias is made", point_at(name), True)
    report.equal("it is listed", targets().get(alias), name)
    listed = [found.alias_name for found in client.get_collection_aliases(name).aliases]
    report.equal("the collection lists it", listed, [alias])
    report.equal("count through it", client.count(alias).count, len(CITIES))
    hits = client.query_points(alias, query=[0.0, 0.0, 0.0, 1.0], limit=1).points
    report.equal("query through it", ids(hits), [5])
    point_at(other)
    report.equal("it is pointed elsewhere", client.count(alias).count, 0)
    rename = models.RenameAlias(old_alias_name=alias, new_alias_name=renamed)
    client.update_collection_aliases([models.RenameAliasOperation(rename_alias=rename)])
    report.equal("it is renamed", (targets().get(alias), targets().get(renamed)), (None, other))
    removed = models.DeleteAlias(alias_name=renamed)
    client.update_collection_aliases([models.DeleteAliasOperation(delete_alias=removed)])
    report.check("it is removed", renamed not in targets())
    report.refused("a removed alias names nothing", [404], lambda: client.count(renamed))


def test_snapshots(report, client, collections):
    name = collections.cities("kept")
    report.equal("there are no snapshots at first", client.list_snapshots(name), [])
    made = client.create_snapshot(name)
    report.check("a snapshot is described", made.name and made.size > 0 and len(made.checksum) == 64, repr(made))
    report.equal("it is listed", client.list_snapshots(name), [made])
    client.delete(name, [1, 2])
    client.upsert(name, [models.PointStruct(id=77, vector=[1.0, 0.0, 0.0, 0.0])])
    snapshot = models.SnapshotPriority.SNAPSHOT
    done = client.recover_snapshot(name, made.name, checksum=made.checksum, priority=snapshot)
    report.equal("recover_snapshot answers true", done, True)
    report.equal("what was there is back", ids(client.scroll(name)[0]), ALL_IDS)
    other = collections.name("copy")
    client.recover_snapshot(other, made.name)
    report.equal("it becomes a collection of another name", client.count(other).count, len(CITIES))
    hits = client.query_points(other, query=[1.0, 0.0, 0.0, 0.0], limit=1).points
    report.equal("which is searched", ids(hits), [1])
    replica = models.SnapshotPriority.REPLICA
    report.refused(
        "preferring what is there",
        [400],
        lambda: client.recover_snapshot(name, made.name, priority=replica),
    )
    report.refused("another checksum", [400], lambda: client.recover_snapshot(name, made.name, checksum="0" * 64))
    report.refused("a location of no kind", [400], lambda: client.recover_snapshot(name, "ftp://here/it"))
    report.refused("an unknown snapshot", [404], lambda: client.recover_snapshot(name, "unknown.snapshot"))
    report.refused("a snapshot of nothing", [404], lambda: client.create_snapshot(collections.name("nothing")))
    report.equal("delete_snapshot answers true", client.delete_snapshot(name, made.name), True)
    report.equal("it is not listed any more", client.list_snapshots(name), [])
    report.refused("deleting it again", [404], lambda: client.delete_snapshot(name, made.name))
    client.create_snapshot(name, wait=False)
    report.check("one is made without waiting", is_eventually(lambda: len(client.list_snapshots(name)) == 1))


def test_many_points(report, client, collections):
    """Enough points that they are searched through a graph, compared with an exact search here."""
    random = np.random.default_rng(7)
    vectors = random.standard_normal((4000, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    name = collections.create("many", cosine(32))
    for start in range(0, len(vectors), 500):
        numbers = range(start, start + 500)
        batch = [models.PointStruct(id=n, vector=vectors[n].tolist(), payload={"mod": n % 10}) for n in numbers]
        client.upsert(name, batch)
    report.equal("every point is there", client.count(name).count, len(vectors))

    found, found_filtered = 0, 0
    third = models.Filter(must=[equals("mod", 3)])
    kept = np.arange(len(vectors)) % 10 == 3
    is_filter_obeyed = True
    queries = random.standard_normal((25, 32)).astype(np.float32)
    for query in queries:
        scores = vectors @ query
        hits = client.query_points(name, query=query.tolist(), limit=10).points
        found += len(set(ids(hits)) & set(np.argsort(-scores)[:10].tolist()))
        hits = client.query_points(name, query=query.tolist(), query_filter=third, limit=10).points
        is_filter_obeyed &= len(hits) == 10 and all(hit.payload["mod"] == 3 for hit in hits)
        best = np.argsort(-np.where(kept, scores, -np.inf))[:10]
        found_filtered += len(set(ids(hits)) & set(best.tolist()))
    wanted = 10 * len(queries)
    report.check("the recall is at least 0.95", found >= 0.95 * wanted, f"{found} of {wanted}")
    report.check("a filter is obeyed", is_filter_obeyed)
    report.check(
        "the filtered recall is at least 0.95", found_filtered >= 0.95 * wanted, f"{found_filtered} of {wanted}"
    )

    seen, offset = [], None
    while True:
        points, offset = client.scroll(name, limit=700, offset=offset, with_payload=False)
        seen += ids(points)
        if offset is None:
            break
    report.equal("pages go through every point once", seen, list(range(len(vectors))))


def test_wrong_key(report, base_url):
    client = connect(base_url, "wrong")
    report.refused("a wrong key is refused", [401, 403], client.get_collections)


TESTS = [
    test_cluster,
    test_collections,
    test_missing_collection,
    test_bad_requests,
    test_points,
    test_eventual_writes,
    test_filters,
    test_payload_index,
    test_scroll,
    test_query,
    test_query_selectors,
    test_fusion,
    test_named_vectors,
    test_distances,
    test_payload_changes,
    test_delete,
    test_aliases,
    test_snapshots,
    test_many_points,
]


def connect(base_url, api_key):
    return QdrantClient(url=base_url, port=None, api_key=api_key, timeout=60, check_compatibility=False)


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    base_url = sys.argv[1].rstrip("/")
    api_key = sys.argv[2] if len(sys.argv) == 3 else None
    warnings.filterwarnings("ignore", message="Api key is used with an insecure connection")
    report = Report()
    client = connect(base_url, api_key)
    collections = Collections(client)
    try:
        report.section(test_service, client)
        for test in TESTS:
            report.section(test, client, collections)
        if api_key:
            report.section(test_wrong_key, base_url)
    finally:
        collections.delete_all()
    print(f"{report.passed} passed, {report.failed} failed")
    sys.exit(1 if report.failed else 0)


if __name__ == "__main__":
    main()
