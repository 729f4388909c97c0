from edgelora.cli import main

main()
