"""Text in, text out: tokenises, admits, streams, detokenises, stops; over gRPC and OpenAI's HTTP.

Knows nothing of stages, blocks and steps: it hands token ids to the scheduler and gets ids back.
"""
