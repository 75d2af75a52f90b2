"""Tables, figures and pictures of the documentation, made from the results in ``docs/benchmarks/data``.

``make tables`` (``python -m kvtuner_tools.bench.tables``) rewrites README.md, ``docs/**/*.md`` and the two pictures.
To publish a newer measurement, put its file in place of the old one and run that.
"""
