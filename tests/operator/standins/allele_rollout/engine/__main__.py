from standin_server import serve

serve("--port")
