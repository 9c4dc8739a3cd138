"""An HTTP server for one bundle, with OpenAI's API.

Reading order: server.py (sockets and signals), app.py (routes), requests.py (what may be asked), answers.py (what is
said), openapi.py (how that is described), driver.py (the thread that runs the batch), records.py (what is known of a
request at its end), log.py, errors.py, metrics.py, page.html.
Needs the extra `serve`. ray_app.py is the same behind Ray Serve, and needs the extra `ray`.
"""
