"""The OpenAI-compatible HTTP front: shapes of bodies and answers over the gateway's core."""
