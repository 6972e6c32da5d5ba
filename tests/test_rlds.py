"TFRecord, RLDS and its conventions: what TensorFlow Datasets wrote is read bit for bit, what is broken is named, and everything goes in and out"
import gzip, json, os, pickle, shutil, struct
from pathlib import Path

import numpy as np, pytest

from test_convert import full, jpegs
from test_data import wander
from vla_nb.data import rlds as rlds_page, tfrecord
from vla_nb.data.convert import compare, convert
from vla_nb.data.dataset import DataConfig, open_source, train_val
from vla_nb.data.doctor import check, report, require_healthy
from vla_nb.data.episode import ArraySource, EpisodeSource
from vla_nb.data.loader import Loader
from vla_nb.data.parts import decode_picture
from vla_nb.data.rlds import RldsSource, buffered, find_rlds, plain
from vla_nb.data.rlds_write import lists_of, rlds, write_rlds
from vla_nb.data.tfrecord import (_crc32c, crc32c, encode_example, index_shards, mask, pack_varints, parse_example, read_list, scan_records,
    unpack_varints, write_records)
from vla_nb.data.windows import Windows

tiny = Path(__file__).parent/'fixtures'/'rlds_tiny'
inf = float('inf')


def keep(s): return s
def inner(get): return {**{k: v[1:-1] for k,v in plain(get).items()}, 'keep': slice(1, -1)}    # a standardisation that drops both ends


@pytest.fixture(autouse=True)
def quick(monkeypatch): monkeypatch.setattr(os, 'fsync', lambda fd: None)    # what a power cut leaves is the business of other tests


@pytest.fixture
def theirs(tmp_path): return Path(shutil.copytree(tiny, tmp_path/'tiny'))


# framing

def test_the_checksum_is_the_standards_and_both_ways_agree(monkeypatch):
    assert crc32c(b'123456789') == _crc32c(np.frombuffer(b'123456789', np.uint8)) == 0xe3069283
    assert crc32c(b'') == 0 and crc32c(bytes(32)) == 0x8a9136aa and crc32c(b'\xff'*32) == 0x62a8ab43    # RFC 3720
    g, slow = np.random.default_rng(0), [_crc32c]
    data = [g.integers(0, 256, n, dtype=np.uint8) for n in (1, 2, 3, 4, 5, 31, 63, 64, 65, 1000, 4097, 100_000)]
    monkeypatch.setattr(tfrecord, 'google_crc32c', None)
    own = [crc32c(x) for x in data]
    monkeypatch.undo()
    assert own == [crc32c(x) for x in data]
    assert mask(crc32c(b'x')) != crc32c(b'x')


def test_records_go_through_and_every_break_is_named(tmp_path):
    g = np.random.default_rng(1)
    data = [g.bytes(int(n)) for n in g.integers(0, 5000, 20)]
    write_records(tmp_path/'a', data)
    where, stopped = scan_records(tmp_path/'a')
    whole = (tmp_path/'a').read_bytes()
    assert stopped is None and [whole[a:a+n] for a,n in where.tolist()] == data
    for cut in (len(whole)-1, int(where[7,0])-3, int(where[7,0])+10):
        (tmp_path/'b').write_bytes(whole[:cut])
        w, stopped = scan_records(tmp_path/'b')
        assert f'record {len(w)}: expected' in stopped and 'truncated' in stopped
    (tmp_path/'z').write_bytes(gzip.compress(whole))
    assert 'expected an uncompressed TFRecord, found gzip or zlib' in scan_records(tmp_path/'z')[1]
    (tmp_path/'e').write_bytes(b'')
    assert scan_records(tmp_path/'e')[0].shape == (0, 2) and scan_records(tmp_path/'e')[1] is None


@pytest.mark.parametrize('seed', range(3))
def test_numbers_of_any_size_go_through_a_message(seed):
    g = np.random.default_rng(seed)
    ints = np.concatenate([g.integers(-2**63, 2**63, 200), g.integers(-3, 300, 200), [0, 1, 127, 128, 2**63-1, -2**63]])
    lists = dict(i=ints, small=np.arange(5), b=[g.bytes(int(n)) for n in g.integers(0, 300, 50)], f=g.normal(0, 1, 77).astype(np.float32), t=np.array([True, False]), none=np.zeros(0, np.float32), empty=[])
    msg = memoryview(encode_example(lists))
    found = {k: read_list(msg, v) for k,v in parse_example(msg, 0, len(msg)).items()}
    assert (found['i'][1] == ints).all() and (found['f'][1] == lists['f']).all() and [bytes(msg[a:b]) for a,b in found['b'][1]] == lists['b'] and found['t'][1].tolist() == [1, 0]
    assert (unpack_varints(np.frombuffer(pack_varints(ints), np.uint8)) == ints).all() and not len(found['none'][1]) and not len(found['empty'][1])


def test_lists_that_are_not_packed_are_read_too():
    part = lambda n, d: pack_varints(np.array([n << 3 | 2, len(d)])) + d
    floats = b''.join(b'\x0d' + struct.pack('<f', x) for x in (1.5, -2))    # field 1, four bytes
    ints = b''.join(b'\x08' + pack_varints(np.array([x])) for x in (3, -4))    # field 1, a varint
    msg = memoryview(part(1, part(1, part(1, b'f')+part(2, part(2, floats))) + part(1, part(1, b'i')+part(2, part(3, ints)))))
    got = {k: read_list(msg, v) for k,v in parse_example(msg, 0, len(msg)).items()}
    assert got['f'][1].tolist() == [1.5, -2] and got['i'][1].tolist() == [3, -4]


@pytest.mark.parametrize('junk', [b'\xff'*40, b'\x0a\x7f', b'\x0b', b'\x80'])
def test_what_is_no_message_is_refused(junk):
    with pytest.raises(ValueError): parse_example(memoryview(junk), 0, len(junk))


def test_the_index_is_kept_by_content_and_made_anew(tmp_path, monkeypatch):
    files = []
    for k in range(5): write_records(p := tmp_path/f's{k}', [b'%d %d' % (k, i) for i in range(4)]); files.append((p, 4))
    rows, faults = index_shards(files, tmp_path/'.index.npz')
    assert rows.shape == (20, 4) and not any(faults)
    monkeypatch.setattr(tfrecord, 'index_shard', None)    # would fail if it were called
    again, _ = index_shards(files, tmp_path/'.index.npz')
    assert (again == rows).all()
    monkeypatch.undo()
    (tmp_path/'.index.npz').write_bytes(b'PK half')
    assert (index_shards(files, tmp_path/'.index.npz')[0] == rows).all()
    b = bytearray(files[2][0].read_bytes()); b[rows[9,2]] ^= 1; files[2][0].write_bytes(b)
    rows, faults = index_shards(files, tmp_path/'.index.npz')
    assert [i for i,f in enumerate(faults) if f] == [9] and 'masked crc32c' in faults[9]


@pytest.mark.parametrize('harm', [lambda b: b[:len(b)//2], lambda b: b[:-30], lambda b: b''])
def test_a_broken_index_is_made_again(tmp_path, harm):
    write_records(tmp_path/'s', [b'a', b'b'])
    want, _ = index_shards([(tmp_path/'s', 2)], tmp_path/'.index.npz')
    (tmp_path/'.index.npz').write_bytes(harm((tmp_path/'.index.npz').read_bytes()))
    assert (index_shards([(tmp_path/'s', 2)], tmp_path/'.index.npz')[0] == want).all()


# how long episodes are, and how they ended

def test_lengths_are_counted_once_for_all_starts_workers_and_parts(tmp_path, monkeypatch):
    write_rlds(tmp_path/'d', ArraySource([full(i, l=10+i) for i in range(6)]), shards=2)
    parsed, real = [], rlds_page.parse_example
    def count(*args): parsed.append(args); return real(*args)
    monkeypatch.setattr(rlds_page, 'parse_example', count)
    half = RldsSource(tmp_path/'d', 'train[3:]')
    assert half.lengths().tolist() == [13, 14, 15]
    src = RldsSource(tmp_path/'d')
    assert src.lengths().tolist() == [10, 11, 12, 13, 14, 15]
    parsed.clear()
    again, worker = RldsSource(tmp_path/'d'), pickle.loads(pickle.dumps(src))
    assert again.lengths().tolist() == worker.lengths().tolist() == src.lengths().tolist() and not parsed
    assert RldsSource(tmp_path/'d', standardize=inner).lengths().tolist() == [8, 9, 10, 11, 12, 13], 'another standardisation, other lengths'
    assert len(list((tmp_path/'d').glob('.lengths-train-*.npz'))) == 2 and not list((tmp_path/'d').glob('.*.tmp'))
    parsed.clear()
    shutil.copytree(tmp_path/'d', tmp_path/'e')
    write_rlds(tmp_path/'new', ArraySource([full(i, l=20) for i in range(6)]), shards=2)
    for p in (tmp_path/'new').glob('demos*'): shutil.copy(p, tmp_path/'d'/p.name)
    assert RldsSource(tmp_path/'d').lengths().tolist() == [20]*6 and parsed
    (tmp_path/'e'/'.lengths-train-plain.npz').write_bytes(b'PK half')
    assert RldsSource(tmp_path/'e').lengths().tolist() == [10, 11, 12, 13, 14, 15]
    assert RldsSource(tmp_path/'e', cache=False).lengths().sum() == RldsSource(tmp_path/'e', standardize=lambda get: plain(get)).lengths().sum() == 75 and not list((tmp_path/'e').glob('*lambda*'))


def relabel(path, **lists): # As somebody else's data set: no metadata of ours, and these lists for each episode
    eps = [full(i) for i in range(len(next(iter(lists.values()))))]
    write_rlds(path, ArraySource(eps))
    write_records(path/'demos-train.tfrecord-00000-of-00001', [encode_example({**{k: v for k,v in lists_of(e).items() if not k.startswith('episode_metadata')}, **{f'steps/{k}': v[i] for k,v in lists.items()}}) for i,e in enumerate(eps)])
    tree = json.loads((path/'features.json').read_text())
    del tree['featuresDict']['features']['episode_metadata']
    (path/'features.json').write_text(json.dumps(tree))
    return path


def test_a_terminal_state_is_no_success_until_somebody_says_so(tmp_path):
    zero, one, dense = np.zeros(12, np.float32), np.eye(12, dtype=np.float32)[11], np.linspace(0, 1, 12, dtype=np.float32)
    at = relabel(tmp_path/'d', reward=[zero, one, dense, one], is_terminal=[one > 0, one > 0, zero > 0, zero > 0])
    flags = lambda more: [s.episode(i).success for s in [open_source(f'{at}{more}')] for i in range(4)]
    assert flags('') == [None, True, None, True]
    assert flags('?success=terminal') == [True, True, False, False]
    assert flags('?success=reward') == [False, True, True, True]
    assert flags('?success=all') == flags('?split=train&success=all') == [True]*4
    assert len({open_source(f'{at}{x}').fingerprint for x in ('', '?success=terminal', '?success=reward', '?success=all')}) == 4
    tree = json.loads((at/'features.json').read_text())
    del tree['featuresDict']['features']['steps']['sequence']['feature']['featuresDict']['features']['is_terminal']
    (at/'features.json').write_text(json.dumps(tree))
    with pytest.raises(ValueError, match='steps/is_terminal: expected one for each step, .* found "?no such feature'): open_source(f'{at}?success=terminal').episode(0)
    assert {f.field for f in check(open_source(f'{at}?success=terminal'))} == {'steps/is_terminal'}


def test_a_mixture_says_it_behind_its_folders(tmp_path):
    for k in 'ab': relabel(tmp_path/k, reward=[np.zeros(12, np.float32)]*4)
    (tmp_path/'m.json').write_text(json.dumps(dict(t=dict(dataset_dir=['a?success=all', 'b?success=reward']))))
    mix = open_source(tmp_path/'m.json')
    assert [mix.episode(i).success for i in range(8)] == [True]*4+[False]*4
    with pytest.raises(ValueError, match='write it behind its folders'): open_source(f'{tmp_path}/m.json?success=all')


# what TensorFlow Datasets wrote

def test_it_reads_what_tensorflow_wrote_bit_for_bit(theirs):
    src, want = RldsSource(theirs), np.load(tiny/'expected_train.npz')
    assert (src.name, src.split, len(src)) == ('libero_tiny', 'train', 3)
    seen = 0
    for i in range(3):
        rec = src.record(i)
        for key in want:
            n, name = key.split(':', 1)
            if int(n) != i: continue
            name, _, how = name.partition('#')
            x, seen = rec[name.replace('.', '/')], seen+1
            if how == 'text': assert x == want[key].tolist(), key
            elif how == 'decoded': assert all((decode_picture(d) == w).all() for d,w in zip(x, want[key], strict=True)), key
            else: assert x.dtype == want[key].dtype and x.shape == want[key].shape and x.tobytes() == want[key].tobytes(), key
    assert seen == len(want.files)


def test_its_episodes_are_episodes(theirs):
    src = open_source(theirs)
    assert isinstance(src, RldsSource) and isinstance(src, EpisodeSource) and src.lengths().tolist() == [10, 12, 11] and src.cameras == ('image', 'wrist_image')
    e = src.episode(1)
    assert e.action.shape == (12, 7) and e.state.shape == (12, 8) and e.cameras['image'][3].shape == (16, 16, 3) and e.cameras['image'].jpeg(0)[:2] == b'\xff\xd8' and e.cameras['wrist_image'].jpeg(0) is None
    assert open_source(theirs.parent).fingerprint == src.fingerprint and len(RldsSource(theirs, 'val')) == 2
    assert pickle.loads(pickle.dumps(src)).episode(2).instruction == src.episode(2).instruction
    with pytest.raises(ValueError, match="split: expected one of .*'train', 'val'.*found 'test'"): RldsSource(theirs, 'test')


@pytest.mark.parametrize('how', ['tiny', 'ours'])
def test_a_flipped_bit_is_refused_with_file_record_and_checksum(tmp_path, theirs, how, capsys):
    from vla_nb.cli import main
    if how == 'ours': theirs = write_rlds(tmp_path/'ours', ArraySource([full(i) for i in range(4)]))
    src = RldsSource(theirs)
    name, at = src.files[0][0], int(src.index[2,2]+src.index[2,3]//2)
    b = bytearray(name.read_bytes()); b[at] ^= 1; name.write_bytes(b)
    bad = RldsSource(theirs)
    bad.episode(0), bad.episode(1)
    with pytest.raises(ValueError, match=rf'{name.name}, record 2: data: expected a masked crc32c of 0x[0-9a-f]{{8}}, found 0x[0-9a-f]{{8}}; copy the file again'): bad.episode(2)
    assert [(f.file, f.field) for f in check(bad) if 'dimension' not in f.field] == [(f'{name.name}, record 2', 'data')]
    assert main(['doctor', str(theirs)]) == 2 and f'{name.name}, record 2  data' in capsys.readouterr().out
    with pytest.raises(ValueError, match='masked crc32c'): require_healthy(bad)


def test_the_doctor_believes_no_cached_index(theirs):
    src = RldsSource(theirs)
    p = src.files[0][0]
    stat, b = p.stat(), bytearray(p.read_bytes())
    b[src.index[1,2]+9000] ^= 1
    p.write_bytes(b); os.utime(p, ns=(stat.st_atime_ns, stat.st_mtime_ns))    # as a failing disk would
    assert RldsSource(theirs).faults == ['']*3
    assert [f.file for f in check(RldsSource(theirs)) if f.field == 'data'] == ['libero_tiny-train.tfrecord-00000-of-00001, record 1']


@pytest.mark.parametrize('how,said', [('gone', 'file: expected 3 episodes, found no file'), ('cut', 'length: expected'), ('fewer', 'file: expected 3 records, as the data set says, found 2')])
def test_shards_that_are_missing_cut_or_short_are_named_beside_the_others(theirs, how, said):
    p = theirs/'libero_tiny-train.tfrecord-00000-of-00001'
    if how == 'gone': p.unlink()
    if how == 'cut': p.write_bytes(p.read_bytes()[:-100])
    if how == 'fewer': p.write_bytes(p.read_bytes()[:int(RldsSource(theirs).index[2,2])-12])
    src = RldsSource(theirs)
    assert len(src) == dict(gone=1, cut=3, fewer=3)[how]
    with pytest.raises(ValueError, match=said): src.episode(len(src)-1)
    for _ in range(2):
        with pytest.raises(ValueError, match=said): src.lengths()
    assert any(said in str(f) for f in check(src))


def test_what_is_not_covered_is_said(theirs, tmp_path):
    info = json.loads((theirs/'dataset_info.json').read_text())
    (theirs/'dataset_info.json').write_text(json.dumps({**info, 'fileFormat': 'array_record'}))
    with pytest.raises(ValueError, match="fileFormat: expected 'tfrecord', found 'array_record'"): RldsSource(theirs)
    (theirs/'dataset_info.json').unlink()
    with pytest.raises(ValueError, match='dataset_info.json: expected the list of shards, found none'): RldsSource(theirs)
    for remote in ('gs://a/b', Path('gs://a/b')):
        with pytest.raises(ValueError, match='remote'): find_rlds(remote)
    with pytest.raises(ValueError, match='expected one data set .* found none'): RldsSource(tmp_path/'nothing')
    shutil.copytree(tiny, tmp_path/'sets'/'1.0.0'); shutil.copytree(tiny, tmp_path/'sets'/'2.0.0')
    with pytest.raises(ValueError, match='found 2'): RldsSource(tmp_path/'sets')


@pytest.mark.parametrize('node,why', [({'sequence': {'feature': {'tensor': {'dtype': 'float32', 'shape': {}}}}}, 'a nested sequence'), ({'tensor': {'dtype': 'float32', 'encoding': 'zlib', 'shape': {}}}, 'a tensor encoded as zlib'),
    ({'tensor': {'dtype': 'float32', 'encoding': 'none', 'shape': {'dimensions': ['-1', '3']}}}, 'a tensor of varying shape'), ({'pythonClassName': 'tensorflow_datasets.core.features.video_feature.Video', 'video': {}}, 'a feature of the kind Video')])
def test_features_that_are_not_covered_disturb_nobody_until_they_are_asked_for(theirs, node, why):
    tree = json.loads((theirs/'features.json').read_text())
    tree['featuresDict']['features']['steps']['sequence']['feature']['featuresDict']['features']['observation']['featuresDict']['features']['odd'] = node
    (theirs/'features.json').write_text(json.dumps(tree))
    src = RldsSource(theirs)
    assert len(src.episode(0)) == 10 and 'steps/observation/odd' not in src.record(0)
    with pytest.raises(ValueError, match=f'steps/observation/odd: expected a tensor, a text or an image, found {why}.*does not cover'): src.record(0, ['steps/observation/odd'])


def test_old_features_files_are_refused(theirs):
    (theirs/'features.json').write_text(json.dumps(dict(type='tensorflow_datasets.core.features.features_dict.FeaturesDict', content={})))
    with pytest.raises(ValueError, match='featuresDict: expected a dictionary of features'): RldsSource(theirs)


wrong = {  # what to do to the lists of one episode -> field, found
    'nan': (lambda d: d['steps/action'].__setitem__(5, np.nan), 'steps/action', 'nan at step 1, dimension 1'),
    'short action': (lambda d: d.__setitem__('steps/action', d['steps/action'][:-4]), 'steps/action', '11'),
    'ragged action': (lambda d: d.__setitem__('steps/action', d['steps/action'][:-1]), 'steps/action', '47'),
    'no action': (lambda d: d.pop('steps/action'), 'steps/action', '0'),
    'ints': (lambda d: d.__setitem__('steps/action', np.arange(48)), 'steps/action', 'a list of int64'),
    'garbage': (lambda d: d['steps/observation/top'].__setitem__(6, b'\xff\xd8oh'), 'steps/observation/top', 'frame 6: 4 bytes'),
    'missing frame': (lambda d: d['steps/observation/top'].pop(), 'steps/observation/top', '11'),
    'two instructions': (lambda d: d['steps/language_instruction'].__setitem__(4, b'x'), 'steps/language_instruction', '2, another from step 4'),
    'empty instruction': (lambda d: d.__setitem__('steps/language_instruction', [b' ']*12), 'steps/language_instruction', 'an empty text'),
    'not utf-8': (lambda d: d['steps/subtask'].__setitem__(4, b'gr\xfcn'), 'steps/subtask', 'utf-8'),
}


@pytest.mark.parametrize('how', wrong)
def test_each_fault_of_an_episode_is_named_by_the_command_and_training_refuses(tmp_path, how, capsys):
    from vla_nb.cli import main
    write_rlds(tmp_path/'d', ArraySource([full(2*i) for i in range(4)]), shards=4)
    lists = lists_of(full(4))
    wrong[how][0](lists)
    write_records(tmp_path/'d'/'demos-train.tfrecord-00002-of-00004', [encode_example(lists)])
    name = 'demos-train.tfrecord-00002-of-00004, record 0'
    faults = check(RldsSource(tmp_path/'d'))
    assert (name, wrong[how][1]) in [(f.file, f.field) for f in faults] and all(f.file == name for f in faults), report(faults)
    assert wrong[how][2] in next(f for f in faults if f.field == wrong[how][1]).found
    assert main(['doctor', str(tmp_path/'d')]) == 2 and f'{name}  {wrong[how][1]}' in capsys.readouterr().out
    assert main(['train', '--data', str(tmp_path/'d'), '--out', str(tmp_path/'run')]) == 2 and f'{name}: {wrong[how][1]}: expected' in capsys.readouterr().err


# writing

@pytest.mark.parametrize('shards', [1, 2, 4])
def test_every_field_survives(tmp_path, shards):
    eps = [full(0), full(1), full(2, l=40), full(3, l=1)]
    src = RldsSource(write_rlds(tmp_path/'a', ArraySource(eps), shards))
    assert [compare(e, src.episode(i)) for i,e in enumerate(eps)] == [inf]*4 and check(src) == [] and src.lengths().tolist() == [12, 12, 40, 1]
    for e,i in zip(eps, range(4)):
        for c,f in e.cameras.items(): assert f.data == [src.episode(i).cameras[c].jpeg(t) for t in range(len(f))], 'the very bytes'
    assert not list(tmp_path.rglob('.*tmp'))


def test_what_is_optional_may_be_absent_and_must_be_so_in_all(tmp_path):
    eps = [jpegs(i) for i in range(2)]
    src = RldsSource(write_rlds(tmp_path/'a', ArraySource(eps)))
    assert [compare(e, src.episode(i)) for i,e in enumerate(eps)] == [inf]*2
    with pytest.raises(ValueError, match='episode 1: steps/reward: expected none as in features.json, found float32'): write_rlds(tmp_path/'b', ArraySource([jpegs(0), jpegs(1, reward=np.ones(12))]))
    with pytest.raises(ValueError, match=r'steps/observation/top: expected uint8 \(\d+, \d+, 3\) as in features.json'): write_rlds(tmp_path/'b', ArraySource([wander(0), wander(1, size=(48, 64))]))
    with pytest.raises(ValueError, match="camera 'state': expected a name that is no field"): write_rlds(tmp_path/'b', ArraySource([jpegs(0, cameras=('state',))]))
    with pytest.raises(ValueError, match='shards: expected 1 to 2'): write_rlds(tmp_path/'b', ArraySource(eps), 3)
    assert not (tmp_path/'b').exists()


def test_a_conversion_goes_on_where_it_stopped(tmp_path):
    src = ArraySource([full(i) for i in range(5)])
    convert(src, tmp_path/'a', rlds(), progress=False)
    (tmp_path/'a'/'demos-train.tfrecord-00003-of-00005').unlink()
    with pytest.raises(ValueError, match='00003-of-00005, record 0: file: expected 1 episodes, found no file'): open_source(tmp_path/'a').episode(3)
    assert convert(src, tmp_path/'a', rlds(), progress=False)['written'] == 1 and len(open_source(tmp_path/'a')) == 5
    from vla_nb.data.folders import folders
    with pytest.raises(ValueError, match="to: expected 'folders', found 'rlds': made of other data or with other settings"): convert(src, tmp_path/'a', folders(), progress=False)


# loading

def test_fifty_shards_shuffle_exactly_shard_and_resume(tmp_path):
    src = open_source(write_rlds(tmp_path/'a', ArraySource([wander(i, l=10+i%5, cameras=('top',), size=(8, 8)) for i in range(150)]), shards=50, lossless=True))
    assert len(src.files) == 50 and len(src) == 150
    w = Windows(src, 4)
    load = lambda **kw: Loader(w, 32, keep, size=(8, 8), seed=3, **kw)
    names = lambda batches: [list(zip(s.episode.tolist(), s.step.tolist())) for s in batches]
    n = len(load())
    epoch = names(load(steps=n, threads=4))
    flat = [x for b in epoch for x in b]
    assert len(set(flat)) == len(flat) == 32*n
    where = np.array([w.bounds[e]+t for e,t in flat])
    assert abs(np.corrcoef(where, np.arange(len(where)))[0,1]) < .05, 'far from the order of the files'
    assert names(load(start_step=n//2, steps=n//2+3)) == epoch[n//2:n//2+3]
    one, two = (names(load(steps=20, rank=r, world=2)) for r in (0, 1))
    assert len({x for b in one+two for x in b}) == 2*20*32
    for a,b in zip(load(steps=6, threads=0), load(steps=6, threads=3)): assert (a.images == b.images).all() and a.images.any()


def test_a_buffer_gives_everything_once_and_nothing_early():
    for size in (1, 7, 50, 500):
        order = list(buffered(range(200), size, 1))
        assert sorted(order) == list(range(200)) and all(x <= k+size for k,x in enumerate(order))
    assert list(buffered(range(50), 1)) == list(range(50)) and list(buffered(range(50), 20, 0)) == list(buffered(range(50), 20, 0)) != list(buffered(range(50), 20, 1))
    with pytest.raises(ValueError, match='size: expected at least 1'): list(buffered([1], 0))


def test_weights_of_a_mixture_hold_for_rlds(tmp_path):
    for k in 'ab': write_rlds(tmp_path/k, ArraySource([wander(i, l=30) for i in range(6)]), shards=2)
    (tmp_path/'m.json').write_text(json.dumps(dict(t=dict(dataset_dir=['a', 'b'], sample_weights=[3, 1]))))
    train, _ = train_val(open_source(tmp_path/'m.json'), DataConfig(val_fraction=.2), 4)
    eps = np.concatenate([s.episode.numpy() for s in Loader(train, 16, keep, size=(8, 8), steps=15)])
    assert abs((eps < 5).mean()-.75) < .02
