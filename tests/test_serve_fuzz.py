"""The search API called in every way that its description allows, and in ways that it does not."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

OPERATIONS = [
    "GET /api/info",
    "POST /api/search",
    "GET /api/items/image/thumbnail",
    "GET /api/items/image/view",
    "GET /api/items/{kind}",
    "GET /api/map",
]


@pytest.fixture(scope="module")
def operations(served):
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis calls the API by its description")
    schema = schemathesis.openapi.from_url(f"{served}/api/openapi.json")
    return {operation.ok().label: operation.ok() for operation in schema.get_all_operations()}


def test_the_description_has_all_operations(operations):
    assert sorted(operations) == sorted(OPERATIONS)


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, "positive") for name in OPERATIONS]
    + [(name, "negative") for name in OPERATIONS if name not in ("GET /api/info", "GET /api/map")],  # they take nothing
)
def test_no_call_leads_to_an_error_of_the_server(operations, name, mode):
    from schemathesis import GenerationMode

    operation = operations[name]
    examples = 25 if name == "POST /api/search" else 8

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def call(data):
        case = data.draw(operation.as_strategy(GenerationMode(mode)))
        answer = case.call()
        assert answer.status_code < 500, answer.text
        operation.validate_response(answer, case=case)
        if answer.status_code >= 400:
            assert list(answer.json()) == ["error"]

    call()
