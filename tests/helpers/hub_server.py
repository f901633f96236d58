"""A hub on loopback, as much of it as the `huggingface_hub` client needs to create, upload to and download from.

Repositories are kept in memory; every commit has its own revision. Requests are logged as (method, path).
"""
import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Dict, List, Optional, Tuple
from urllib.parse import unquote, urlsplit

TOKEN = 'hf_' + 'loopback' * 4


class Hub:
    """The state of the hub, and the server over it. Use as a context manager; `url` goes into HF_ENDPOINT."""

    def __init__(self) -> None:
        self.repos: Dict[str, List[Tuple[str, Dict[str, bytes]]]] = {}  # commits (id, files), oldest first
        self.blobs: Dict[str, bytes] = {}  # large files, by SHA-256
        self.log: List[Tuple[str, str]] = []
        self.corrupt_next = 0  # how many downloads of large files to damage
        hub = self

        class Handler(HubHandler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server.server_port}'

    def __enter__(self) -> 'Hub':
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repo: str, files: Dict[str, Optional[bytes]]) -> str:
        """Add a commit that adds files, or deletes those that are None; its id."""
        history = self.repos.setdefault(repo, [])
        tree = dict(history[-1][1]) if history else {}
        for path, content in files.items():
            if content is None:
                tree.pop(path, None)
            else:
                tree[path] = content
        revision = hashlib.sha1(f'{repo}{len(history)}'.encode()).hexdigest()
        history.append((revision, tree))
        return revision

    def find(self, repo: str, revision: str) -> Optional[Tuple[str, Dict[str, bytes]]]:
        """A commit by id or branch."""
        history = self.repos.get(repo, [])
        if revision == 'main':
            return history[-1] if history else None
        return next((commit for commit in history if commit[0] == revision), None)


class HubHandler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, body: object = b'', headers: Optional[Dict[str, str]] = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {'Content-Length': str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)

    def error(self, status: int, code: str) -> None:
        self.reply(status, {'error': code}, {'X-Error-Code': code, 'X-Error-Message': code})

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get('Content-Length', 0)))

    def dispatch(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append((self.command, path))
        body = self.body()
        if self.command in ('POST', 'PUT') and not path.startswith('/lfs/'):
            if self.headers.get('Authorization') != f'Bearer {TOKEN}':
                return self.error(401, 'Unauthorized')
        if path == '/api/whoami-v2':
            return self.reply(200, {'type': 'user', 'name': 'owner', 'orgs': []})
        if path == '/api/validate-yaml':
            return self.reply(200, {'warnings': [], 'errors': []})
        if path == '/api/repos/create':
            request = json.loads(body)
            repo = '/'.join(filter(None, (request.get('organization') or 'owner', request['name'])))
            if repo in self.hub.repos:
                return self.reply(409, {'error': 'exists', 'url': f'{self.hub.url}/{repo}'})
            self.hub.commit(repo, {'.gitattributes': b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n'})
            return self.reply(200, {'url': f'{self.hub.url}/{repo}', 'name': repo})
        if match := re.fullmatch(r'/lfs/([0-9a-f]{64})', path):
            if hashlib.sha256(body).hexdigest() != match[1]:
                return self.error(400, 'BadDigest')
            self.hub.blobs[match[1]] = body
            return self.reply(200)
        if match := re.fullmatch(r'/(.+?)\.git/info/lfs/objects/batch', path):
            objects = [dict(
                oid=item['oid'], size=item['size'],
                actions={'upload': {'href': f'{self.hub.url}/lfs/{item["oid"]}', 'header': {}}},
            ) for item in json.loads(body)['objects']]
            return self.reply(200, {'transfer': 'basic', 'objects': objects},
                              {'Content-Type': 'application/vnd.git-lfs+json'})
        if match := re.fullmatch(r'/api/models/([^/]+/[^/]+)/preupload/(.+)', path):
            return self.reply(200, {'files': [dict(
                path=file['path'], shouldIgnore=False,
                uploadMode='lfs' if file['path'].endswith('.safetensors') else 'regular',
            ) for file in json.loads(body)['files']]})
        if match := re.fullmatch(r'/api/models/([^/]+/[^/]+)/commit/(.+)', path):
            return self.add_commit(match[1], body)
        if match := re.fullmatch(r'/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?(/.*)?', path):
            return self.info(match[1], match[2], match[3] or 'main')
        if match := re.fullmatch(r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', path):
            return self.resolve(*match.groups())
        return self.error(404, 'NotFound')

    def add_commit(self, repo: str, body: bytes) -> None:
        files: Dict[str, Optional[bytes]] = {}
        for line in body.splitlines():
            item = json.loads(line)
            if item['key'] == 'file':
                files[item['value']['path']] = base64.b64decode(item['value']['content'])
            elif item['key'] == 'lfsFile':
                files[item['value']['path']] = self.hub.blobs[item['value']['oid']]
        revision = self.hub.commit(repo, files)
        url = f'{self.hub.url}/{repo}/commit/{revision}'
        self.reply(200, {'success': True, 'commitOid': revision, 'commitUrl': url})

    def info(self, repo: str, what: Optional[str], revision: str) -> None:
        if repo not in self.hub.repos:
            return self.error(404, 'RepoNotFound')
        commit = self.hub.find(repo, revision)
        if commit is None:
            return self.error(404, 'RevisionNotFound')
        if what == 'tree':
            return self.reply(200, [
                dict(type='file', path=path, size=len(content), oid=hashlib.sha1(content).hexdigest())
                for path, content in commit[1].items()])
        return self.reply(200, {
            'id': repo, 'sha': commit[0], 'private': False, 'tags': [], 'downloads': 0, 'likes': 0,
            'siblings': [{'rfilename': path} for path in commit[1]]})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if repo not in self.hub.repos:
            return self.error(404, 'RepoNotFound')
        commit = self.hub.find(repo, revision)
        if commit is None:
            return self.error(404, 'RevisionNotFound')
        content = commit[1].get(path)
        headers = {'X-Repo-Commit': commit[0]}
        if content is None:
            return self.reply(404, {'error': 'EntryNotFound'}, {**headers, 'X-Error-Code': 'EntryNotFound'})
        headers['ETag'] = f'"{hashlib.sha256(content).hexdigest()}"'
        if self.command == 'GET' and path.endswith('.safetensors') and self.hub.corrupt_next > 0:
            self.hub.corrupt_next -= 1
            content = bytes(len(content))
        self.reply(200, content, headers)

    do_GET = do_HEAD = do_POST = do_PUT = dispatch
