from glm4v_jax.serve.errors import ApiError


def test_the_body_is_that_of_openai():
    error = ApiError(429, "queue: found 64 requests waiting", code="queue_full", headers={"Retry-After": "1"})
    assert error.body() == {
        "error": {
            "message": "queue: found 64 requests waiting",
            "type": "rate_limit_error",
            "param": None,
            "code": "queue_full",
        }
    }
    assert (error.status, error.headers) == (429, {"Retry-After": "1"})
    assert ApiError(500, "x").type == "server_error" and ApiError(422, "x").type == "invalid_request_error"
