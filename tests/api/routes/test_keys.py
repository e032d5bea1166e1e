from core.db.models import ApiKey
from tests.api.conftest import Api
from tests.api.problems import problem


class TestKeys:
    def test_anonymous(self, api: Api) -> None:
        problem(api.get("/v1/keys", by=None), 401, "unauthenticated")

    def test_users_may_not(self, api: Api) -> None:
        problem(api.get("/v1/keys"), 403, "forbidden")
        problem(api.post("/v1/keys", {"name": "x", "role": "admin"}), 403, "forbidden")
        problem(api.call("DELETE", "/v1/keys/key_00000000000000000000000000"), 403, "forbidden")

    def test_secret_is_shown_once_and_works(self, api: Api) -> None:
        made = api.post("/v1/keys", {"name": "laptop", "user": "carol"}, by="admin").json()
        api.keys["carol"] = made["key"]
        assert api.get("/v1/jobs", by="carol").status_code == 200
        listed = api.get(f"/v1/keys/{made['id']}", by="admin").json()
        assert "key" not in listed
        assert made["key"].startswith(listed["prefix"])
        assert listed["last_used_at"] is not None

    def test_repeated_answer_leaves_the_secret_out(self, api: Api) -> None:
        body, headers = {"name": "laptop"}, {"Idempotency-Key": "k"}
        first, second = (api.post("/v1/keys", body, by="admin", headers=headers).json() for _ in range(2))
        assert first["key"]
        assert second == {**first, "key": None}

    def test_revoked_key_stops_working(self, api: Api) -> None:
        made = api.post("/v1/keys", {"name": "laptop", "user": "carol"}, by="admin").json()
        api.keys["carol"] = made["key"]
        for _ in range(2):
            assert api.call("DELETE", f"/v1/keys/{made['id']}", by="admin").status_code == 204
        problem(api.get("/v1/jobs", by="carol"), 401, "unauthenticated")

    def test_last_admin_key_stays(self, api: Api) -> None:
        problem(api.call("DELETE", "/v1/keys/key_00000000000000000000000000", by="admin"), 409, "conflict")

    def test_use_is_noted_at_most_once_a_minute(self, api: Api) -> None:
        def used() -> object:
            with api.database.read() as session:
                return session.query(ApiKey.last_used_at).filter(ApiKey.user == "alice").scalar()

        api.get("/v1/jobs")
        first = used()
        api.get("/v1/jobs")
        assert first is not None
        assert used() == first
