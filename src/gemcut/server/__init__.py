"""The HTTP server: OpenAI's API over one engine, as a plain ASGI application (see docs/server.md).

protocol -> app (gates, routes) -> fields (what a request says) -> engine -> delivery -> answer
"""
